// onnxruntime-node and onnxruntime-web (WebAssembly) under Node: node node.mjs PACKAGE FOLDER OUT
// NODE_PATH names the folder that npm installed into. What it reads and writes is told in adapters.py.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { resultsOf } from "./run_cases.mjs";

const [name, folder, out] = process.argv.slice(2);
const require = createRequire(join(process.env.NODE_PATH, "x.js"));
const ort = require(name);
const version = JSON.parse(readFileSync(join(process.env.NODE_PATH, name, "package.json"))).version;
const results = await resultsOf(
  ort,
  JSON.parse(readFileSync(join(folder, "cases.json"))),
  (file) => new Uint8Array(readFileSync(join(folder, file))),
  (file, bytes) => writeFileSync(join(out, file), bytes),
);
writeFileSync(join(out, "results.json"), JSON.stringify({ version, cases: results }));
