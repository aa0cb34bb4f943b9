// The page itself: what is chosen, what is shown. One thing runs at a time, in the order in which it was asked for.

import { open } from "./model.js";
import { Refusal, cropped, decode, prepare } from "./photo.js";
import { diverging, mapPixels, npy, overlayPixels, photoPixels, planes, scaled } from "./picture.js";

const $ = (id) => document.getElementById(id);
const TOP = 5;
const NOTES = {
  gradient: "The plain gradient (Simonyan et al. 2013).",
  deconvnet: "Passes what is positive on the way back (Zeiler & Fergus 2013).",
  guided: "Passes where the unit was active and what arrives is positive (Springenberg et al. 2014).",
};

const opened = new Map(); // models by their option in the method list
let listed = []; // what models/models.json names, and files that were opened here: {name, method, bytes()}
let model = null;
let photo = null; // {name, width, height, pixels}, whole
let shown = null; // the last result, with the model and the photo it was made of
let target = -1; // -1: the strongest

let queue = Promise.resolve();

/** Does one thing after what is under way; what it cannot do is one line on the page. */
function ask(work, doing) {
  queue = queue.then(async () => {
    const before = $("status").textContent;
    document.body.classList.add("busy");
    if (doing) say(doing);
    try {
      await work();
      $("error").hidden = true;
    } catch (error) {
      if (!(error instanceof Refusal)) console.error(error);
      $("error").textContent = error instanceof Refusal ? error.message : `something failed: ${error.message ?? error}`;
      $("error").hidden = false;
      say(before === "Loading ..." ? "" : before);
    }
    document.body.classList.remove("busy");
  });
  return queue;
}

const say = (text) => ($("status").textContent = text);

async function fetched(url) {
  const response = await fetch(url).catch(() => null);
  if (!response?.ok) throw new Refusal(`${url} could not be loaded`);
  return response;
}

async function start() {
  const answer = await fetch("models/models.json").catch(() => null);
  if (!answer?.ok) {
    $("other").open = true;
    throw new Refusal("no model is next to this page: run tools/web/start, or open a converted file");
  }
  const { models, sample } = await answer.json();
  listed = models.map(({ file, method }) => ({
    name: file,
    method,
    bytes: async () => new Uint8Array(await (await fetched(`models/${file}`)).arrayBuffer()),
  }));
  showMethods(listed.findIndex(({ method }) => method === "guided"));
  $("sample").hidden = !sample;
  $("sample").onclick = () =>
    ask(async () => take(new File([await (await fetched(`models/${sample}`)).blob()], sample)), "Reading the photo ...");
  await choose();
  say("Ready: choose a photo.");
}

function showMethods(chosen) {
  const twice = (method) => listed.filter((entry) => entry.method === method).length > 1;
  const text = ({ name, method }) => (twice(method) ? `${method}, ${name}` : method);
  $("method").replaceChildren(...listed.map((entry, i) => new Option(text(entry), i)));
  $("method").selectedIndex = Math.max(chosen, 0);
  $("method").disabled = false;
}

/** Makes the model of the method list the current one; the photo is prepared anew, and explained. */
async function choose() {
  const entry = listed[$("method").value];
  try {
    if (!opened.has(entry)) {
      say(`Loading ${entry.name} ...`);
      opened.set(entry, await open(await entry.bytes(), entry.name));
    }
  } catch (error) {
    $("method").selectedIndex = listed.findIndex((other) => opened.get(other) === model);
    throw error;
  }
  const before = model;
  model = opened.get(entry);
  $("method-note").textContent = NOTES[model.method] ?? "";
  if (String(before?.labels) !== String(model.labels)) {
    target = -1;
    $("classes").replaceChildren(...model.labels.map((label, i) => new Option("", `${i} ${label}`)));
  }
  if (photo) await explain();
}

async function take(file) {
  const taken = { ...(await decode(file)), name: file.name };
  cropped(taken, model.prepared); // a photo that is too small does not take the place of the last one
  [photo, target] = [taken, -1];
  await explain();
}

/** Explains the photo with the model, for the target, and shows the result. */
async function explain() {
  say("Explaining ...");
  const seen = cropped(photo, model.prepared);
  if (!shown) put($("overlay"), photoPixels(seen), `The photo ${photo.name}`);
  const started = performance.now();
  const result = await model.explain(prepare(seen, model.prepared), model.chooses ? target : -1);
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  shown = { ...result, model, seen, photo };
  showTargets();
  draw();
  const score = result.scores[result.target];
  const what = `${className(result.target)}${score === undefined ? "" : `, score ${score.toPrecision(3)}`}`;
  const blank = result.attribution.every((value) => value === 0);
  say(blank ? `${what}: the map is zero everywhere; nothing that is active leads to this class.`
    : `${what}: explained by ${model.method} in ${seconds} s.`);
}

const className = (index) => shown.model.labels[index] ?? `class ${index}`;

function showTargets() {
  const { scores, target: explained } = shown;
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]).slice(0, TOP);
  if (!order.includes(explained)) order.push(explained);
  const focused = document.activeElement?.name === "target";
  $("top").replaceChildren(...order.map((index) => {
    const row = Object.assign(document.createElement("label"), { className: "choice" });
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "target", value: index });
    radio.checked = index === explained;
    const bar = Object.assign(document.createElement("div"), { className: "bar" });
    bar.style.width = `${Math.min(Math.max(scores[index], 0), 1) * 100}%`;
    const parts = [className(index), scores[index].toFixed(3)];
    const spans = parts.map((textContent) => Object.assign(document.createElement("span"), { textContent }));
    row.append(bar, radio, ...spans);
    return row;
  }));
  if (focused) $("top").querySelector(":checked").focus();
  $("class").value = "";
  $("targets").disabled = !shown.model.chooses;
}

function put(canvas, image, label) {
  Object.assign(canvas, { width: image.width, height: image.height }).getContext("2d").putImageData(image, 0, 0);
  canvas.setAttribute("aria-label", label);
}

function draw() {
  const { seen } = shown;
  const { layout, channels } = shown.model.prepared;
  const view = channels === "grey" ? "signed" : $("view").value;
  const map = scaled(planes(shown.attribution, shown.shape, layout), view);
  const order = channels === "bgr" ? [2, 1, 0] : [0, 1, 2];
  const what = `${shown.model.method} attribution of ${className(shown.target)}`;
  put($("map"), mapPixels(map, order, seen.width, seen.height), what);
  const over = overlayPixels(map, order, seen, $("opacity").value / 100);
  put($("overlay"), over, `${what}, over the photo ${shown.photo.name}`);
  const clip = map.clip.toPrecision(3);
  [$("low").textContent, $("high").textContent] = [`−${clip}`, `+${clip}`];
  drawScale(map.values.length === 1);
  $("legend").hidden = $("downloads").hidden = false;
}

function drawScale(signed) {
  const image = new ImageData($("scale").width, 1);
  for (let i = 0; i < image.width; i++) {
    const value = (2 * i) / (image.width - 1) - 1;
    const rgb = signed ? diverging(value) : Array(3).fill(128 + 127 * value);
    image.data.set([...rgb.map(Math.round), 255], 4 * i);
  }
  $("scale").getContext("2d").putImageData(image, 0, 0);
}

/** A class by its number, its name, or "285 Egyptian cat" as the list offers it. */
function classOf(text) {
  const number = /^\d+/.exec(text.trim())?.[0];
  const named = model.labels.findIndex((label) => label.toLowerCase() === text.trim().toLowerCase());
  const index = named >= 0 ? named : number === undefined ? -1 : Number(number);
  if (index < 0 || index >= shown.scores.length) {
    throw new Refusal(`no class is called "${text}": choose one of the list, or a number up to ${shown.scores.length - 1}`);
  }
  return index;
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const stem = () => `${shown.photo.name.replace(/\.[^.]*$/, "")}.${shown.model.method}.${shown.target}`;

/** A dropped or chosen file: a model if it is called so, else a photo. */
function receive(file) {
  if (!file) return;
  if (file.name.toLowerCase().endsWith(".onnx")) {
    ask(async () => {
      const entry = { name: file.name, bytes: async () => new Uint8Array(await file.arrayBuffer()) };
      opened.set(entry, await open(await entry.bytes(), file.name));
      entry.method = opened.get(entry).method;
      listed.push(entry);
      showMethods(listed.length - 1);
      await choose();
      if (!photo) say("Ready: choose a photo.");
    }, `Loading ${file.name} ...`);
  } else {
    ask(async () => {
      if (!model) throw new Refusal("open a model first: no converted file is loaded");
      await take(file);
    }, "Reading the photo ...");
  }
}

for (const id of ["photo", "model"]) {
  $(id).addEventListener("change", ({ target: input }) => {
    receive(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
}
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", ({ relatedTarget }) => relatedTarget ?? document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  receive(event.dataTransfer.files[0]);
});
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("method").addEventListener("change", () => ask(choose));
$("top").addEventListener("change", ({ target: radio }) => {
  ask(async () => {
    target = Number(radio.value);
    await explain();
  });
});
$("class").addEventListener("change", () => {
  if (!shown || !$("class").value) return;
  ask(async () => {
    target = classOf($("class").value);
    await explain();
  });
});
$("view").addEventListener("change", () => shown && draw());
$("opacity").addEventListener("input", () => {
  $("opacity-value").textContent = `${$("opacity").value} %`;
  if (shown) draw();
});
$("npy").addEventListener("click", () => save(npy(shown.attribution, shown.shape), `${stem()}.npy`));
$("png").addEventListener("click", () => $("overlay").toBlob((blob) => save(blob, `${stem()}.png`)));

ask(start, "Loading ...");
