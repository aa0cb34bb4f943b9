"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (id) => document.getElementById(id);
all(".scripted").forEach((part) => { part.hidden = false; });

// Light or dark: as the system says, until the button says otherwise.
const theme = one("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const pressed = () => theme.setAttribute("aria-pressed", String(dark()));
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  pressed();
});
system.addEventListener("change", pressed);
pressed();

// The filters.
const file = one("filter-file");
const kind = one("filter-class");
const photos = all(".photo");
function filter() {
  const off = new Set(all("#filter-methods button[aria-pressed=false]").map((button) => button.dataset.value));
  // The attribute: a part of a drawing has no property of that name.
  all("[data-method]").forEach((part) => part.toggleAttribute("hidden", off.has(part.dataset.method)));
  const wanted = file.value.trim().toLowerCase();
  let shown = 0;
  for (const photo of photos) {
    const fits = photo.dataset.file.toLowerCase().includes(wanted) && (!kind.value || photo.dataset.class === kind.value);
    photo.hidden = !fits;
    shown += fits;
  }
  one("shown").textContent = `${shown} of ${photos.length} photos`;
}
file.addEventListener("input", filter);
kind.addEventListener("change", filter);
all("#filter-methods button").forEach((button) => button.addEventListener("click", () => {
  button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  filter();
}));
filter();

// The zoom: a modal dialog, which Esc closes by itself; the arrow keys go on to the next picture that is shown.
const dialog = one("zoom");
let opener = null;
function show(button) {
  opener = button;
  const map = button.querySelector("img");
  const photo = button.closest(".photo").querySelector(".side img");
  const alone = map === photo;
  one("zoom-title").textContent = map.alt;
  one("zoom-note").textContent = button.dataset.note ?? "";
  one("zoom-photo").src = photo.src;
  one("zoom-photo").alt = photo.alt;
  one("zoom-map").hidden = alone;
  one("zoom-pair").classList.toggle("alone", alone);
  if (!alone) {
    one("zoom-map").src = map.src;
    one("zoom-map").alt = map.alt;
  }
  if (!dialog.open) dialog.showModal();
}
function step(by) {
  const shown = all(".photo:not([hidden]) .zoom").filter((button) => !button.closest("[hidden]"));
  show(shown[(shown.indexOf(opener) + by + shown.length) % shown.length]);
}
all(".zoom").forEach((button) => button.addEventListener("click", () => show(button)));
one("zoom-before").addEventListener("click", () => step(-1));
one("zoom-after").addEventListener("click", () => step(1));
one("zoom-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => opener.focus());
