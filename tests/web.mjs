// Uses the page as a person would, in a headless Chromium: node web.mjs URL PHOTO OUT
// NODE_PATH names the folder that npm installed playwright-core into, CHROMIUM the browser. Writes into OUT the raw maps
// that the page saves, screenshots, and told.json with what the page said after each step.

import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";

const [url, photo, out] = process.argv.slice(2);
const { chromium } = createRequire(join(process.env.NODE_PATH, "x.js"))("playwright-core");
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM,
  viewport: { width: 1200, height: 900 },
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const told = { console: [], requests: [] };
try {
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && told.console.push(message.text()));
  page.on("pageerror", (error) => told.console.push(String(error)));
  page.on("request", (request) => told.requests.push(request.url()));

  const text = (id) => page.textContent(`#${id}`);
  /** Does something, and waits until the page is done with it. */
  async function after(step, action) {
    await action();
    await page.waitForFunction(() => !document.body.classList.contains("busy"), null, { timeout: 120_000 });
    const error = (await page.isVisible("#error")) ? await text("error") : "";
    const top = await page.$$eval("#top .choice", (rows) => rows.map((row) => row.innerText.split("\n")[0]));
    told[step] = { status: await text("status"), error, top, map: await page.getAttribute("#map", "aria-label") };
    if (error) return;
    await page.screenshot({ path: join(out, `${step}.png`), fullPage: true });
  }
  /** Drops a file on the page, as a file manager does. */
  async function drop(name, bytes) {
    const transfer = await page.evaluateHandle(([name, base64]) => {
      const data = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([data], name));
      return transfer;
    }, [name, bytes.toString("base64")]);
    await page.dispatchEvent("body", "drop", { dataTransfer: transfer });
  }
  async function save(name) {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#npy")]);
    await download.saveAs(join(out, `${name}.npy`));
    told[name].file = download.suggestedFilename();
  }
  const run = async (step, action) => {
    await after(step, action);
    if (!told[step].error) await save(step);
  };

  await after("empty", async () => {
    await page.goto(url);
    await page.waitForFunction(() => /^Ready/.test(document.getElementById("status").textContent)
      || !document.getElementById("error").hidden);
  });
  if (!told.empty.error) {
    await after("no_image", () => drop("notes.txt", Buffer.from("no image")));
    await after("no_model", () => drop("broken.onnx", Buffer.from("no model")));
    await after("plain_model", () => drop("plain.onnx", Buffer.from([8, 7]))); // an IR version, and nothing else
    told.unlabelled = await page.$$eval("input, select", (all) => all.filter((one) => !one.labels.length).map((one) => one.id));
    await run("guided", () => drop(basename(photo), readFileSync(photo)));
    await run("other_class", () => page.fill("#class", "tabby").then(() => page.press("#class", "Enter")));
    await after("no_class", () => page.fill("#class", "no such class").then(() => page.press("#class", "Enter")));
    await run("second", () => page.click("#top .choice:nth-child(2)"));
    await run("gradient", () => page.selectOption("#method", { index: 0 }));
    await run("deconvnet", () => page.selectOption("#method", { index: 1 }));
    await after("channels", () => page.selectOption("#view", "channels"));
    await page.emulateMedia({ colorScheme: "dark" });
    await after("dark", () => page.selectOption("#view", "signed"));
    await after("narrow", () => page.setViewportSize({ width: 390, height: 800 }));
    told.overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  }
  writeFileSync(join(out, "told.json"), JSON.stringify(told));
} finally {
  await context.close();
  rmSync(profile, { recursive: true, force: true });
}
