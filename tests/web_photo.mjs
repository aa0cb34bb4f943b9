// Prepares photos as the page does: node web_photo.mjs FOLDER. FOLDER/cases.json lists {file, width, height, text, shape};
// beside each file of RGB bytes its input is written, raw float32, as FILE.in.

import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { cropped, prepare, preprocessing } from "../tools/web/photo.js";

const folder = process.argv[2];
for (const { file, width, height, text, shape } of JSON.parse(readFileSync(join(folder, "cases.json")))) {
  const how = preprocessing(text ?? undefined, shape);
  const { values } = prepare(cropped({ width, height, pixels: readFileSync(join(folder, file)) }, how), how);
  writeFileSync(join(folder, `${file}.in`), values);
}
