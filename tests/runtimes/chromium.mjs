// onnxruntime-web in a headless Chromium: node chromium.mjs PROVIDER FOLDER OUT, with the provider wasm or webgpu (on
// SwiftShader, a GPU in software, so that none is needed).
// NODE_PATH names the folder that npm installed into, CHROMIUM the browser. What it reads and writes is told in
// adapters.py. A server on localhost hands out the cases, the package and this folder, and takes the outputs.

import { createReadStream, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { basename, dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const [provider, folder, out] = process.argv.slice(2);
const packages = process.env.NODE_PATH;
const here = dirname(fileURLToPath(import.meta.url));
const { chromium } = createRequire(join(packages, "x.js"))("playwright-core");

const GRAPHICS = {
  wasm: ["--disable-gpu"],
  webgpu: ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"],
};
const ROOTS = { cases: folder, packages, here };
const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };
const server = createServer((request, response) => {
  const [, root, ...rest] = normalize(decodeURIComponent(request.url.split("?")[0])).split("/");
  if (request.method === "PUT" && root === "out") {
    const chunks = [];
    request.on("data", (chunk) => chunks.push(chunk));
    request.on("end", () => {
      writeFileSync(join(out, basename(rest.join("/"))), Buffer.concat(chunks));
      response.end();
    });
    return;
  }
  const file = root && ROOTS[root] && join(ROOTS[root], ...rest);
  if (root === "") return response.setHeader("Content-Type", "text/html").end("<!doctype html><title>cases</title>");
  if (!file || !statSync(file, { throwIfNoEntry: false })?.isFile()) return response.writeHead(404).end();
  response.setHeader("Content-Type", TYPES[extname(file)] ?? "application/octet-stream");
  createReadStream(file).pipe(response);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM,
  args: ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", ...GRAPHICS[provider]],
});
try {
  const page = await browser.newPage();
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  const results = await page.evaluate(async (provider) => {
    const ort = await import(`/packages/onnxruntime-web/dist/ort.${provider}.min.mjs`);
    const { resultsOf } = await import("/here/run_cases.mjs");
    ort.env.wasm.numThreads = 1;
    const read = async (file) => new Uint8Array(await (await fetch(`/cases/${file}`)).arrayBuffer());
    const write = (file, body) => fetch(`/out/${file}`, { method: "PUT", body });
    const cases = await (await fetch("/cases/cases.json")).json();
    return resultsOf(ort, cases, read, write, { executionProviders: [provider] });
  }, provider);
  const { version } = JSON.parse(readFileSync(join(packages, "onnxruntime-web/package.json")));
  const told = { version: `${version}, Chromium ${browser.browser()?.version() ?? ""}`.trim(), cases: results };
  writeFileSync(join(out, "results.json"), JSON.stringify(told));
} finally {
  await browser.close();
  server.close();
  rmSync(profile, { recursive: true, force: true });
}
