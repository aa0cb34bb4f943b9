// Uses a report as a reader would, in a headless Chromium: node report.mjs REPORT OUT
// NODE_PATH names the folder that npm installed playwright-core into, CHROMIUM the browser. Writes screenshots into OUT,
// and told.json with what was found after each step.

import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [report, out] = process.argv.slice(2);
const { chromium } = createRequire(join(process.env.NODE_PATH, "x.js"))("playwright-core");
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM,
  viewport: { width: 1280, height: 900 },
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});
const told = { url: pathToFileURL(resolve(report)).href, console: [], requests: [], dialogs: 0 };
try {
  const page = await context.newPage();
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && told.console.push(message.text()));
  page.on("pageerror", (error) => told.console.push(String(error)));
  page.on("request", (request) => told.requests.push(request.url()));
  page.on("dialog", (dialog) => { told.dialogs += 1; dialog.dismiss(); });
  const shot = (name, whole = false) => page.screenshot({ path: join(out, `${name}.png`), fullPage: whole });
  const files = () => page.$$eval(".photo:not([hidden])", (all) => all.map((one) => one.dataset.file));
  const maps = () => page.$$eval(".photo:not([hidden]) .maps > :not([hidden])", (all) => all.length);
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  const zoom = async () => ({
    open: await page.$eval("#zoom", (dialog) => dialog.open),
    title: await page.textContent("#zoom-title"),
    focus: await page.evaluate(() => document.activeElement.querySelector("img")?.alt ?? document.activeElement.id),
  });

  await page.goto(told.url);
  told.title = await page.title();
  told.text = await page.innerText("body");
  told.markup = await page.evaluate(() => ({
    scripts: document.scripts.length, mains: document.querySelectorAll("main").length,
    headings: [...document.querySelectorAll("h1, h2, h3")].map((one) => `${one.tagName} ${one.textContent}`),
    unlabelled: [...document.querySelectorAll("input, select")].filter((one) => !one.labels.length).length,
    silent: [...document.querySelectorAll("main img")].filter((one) => !one.alt).length,
    broken: [...document.querySelectorAll("main img")].filter((one) => !one.naturalWidth).length,
    scopeless: document.querySelectorAll("th:not([scope])").length,
    ids: [...document.querySelectorAll("[id]")].map((one) => one.id),
    alts: [...document.querySelectorAll(".maps img")].map((one) => one.alt),
    error: [...document.querySelectorAll(".photo > .error")].map((one) => one.textContent),
  }));
  told.light = await ground();
  told.overflow = await overflow();
  await shot("light");
  await shot("light_whole", true);

  // The filters, by keyboard.
  told.all = { files: await files(), maps: await maps(), status: await page.textContent("#shown") };
  await page.focus("#filter-file");
  await page.keyboard.type(told.all.files[0].slice(0, 4).toUpperCase());
  told.by_file = { files: await files(), status: await page.textContent("#shown") };
  await page.fill("#filter-file", "");
  await page.selectOption("#filter-class", { index: 1 });
  told.by_class = { files: await files(), target: await page.inputValue("#filter-class") };
  await page.selectOption("#filter-class", "");
  await page.focus("#filter-methods button");
  await page.keyboard.press("Space");
  told.by_method = {
    maps: await maps(), pressed: await page.getAttribute("#filter-methods button", "aria-pressed"),
    method: await page.getAttribute("#filter-methods button", "data-value"),
    left: await page.$$eval("[data-method]:not([hidden])", (all) => [...new Set(all.map((one) => one.dataset.method))]),
  };
  await page.keyboard.press("Enter");
  told.again = { files: await files(), maps: await maps() };

  // The zoom, by keyboard.
  await page.focus(".maps .zoom");
  told.outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  await page.keyboard.press("Enter");
  told.zoomed = await zoom();
  await shot("zoomed");
  await page.keyboard.press("ArrowRight");
  told.next = await zoom();
  await page.keyboard.press("Escape");
  told.closed = await zoom();
  await page.click(".side .zoom");
  told.photo = await zoom();
  await page.click("#zoom-close");

  // Dark: as the system has it, and by the button.
  await page.emulateMedia({ colorScheme: "dark" });
  await page.waitForSelector(`#theme[aria-pressed="true"]`); // it hears of the change a little later
  told.dark = { ground: await ground(), pressed: await page.getAttribute("#theme", "aria-pressed") };
  await page.evaluate(() => scrollTo(0, 0));
  await shot("dark");
  await shot("dark_whole", true);
  await page.focus("#theme");
  await page.keyboard.press("Enter");
  told.toggled = { ground: await ground(), pressed: await page.getAttribute("#theme", "aria-pressed") };

  await page.setViewportSize({ width: 400, height: 800 });
  told.narrow = await overflow();
  await shot("narrow");
  await shot("narrow_whole", true);
  told.pwned = await page.evaluate(() => window.pwned ?? null);
  writeFileSync(join(out, "told.json"), JSON.stringify(told));
} finally {
  await context.close();
  rmSync(profile, { recursive: true, force: true });
}
