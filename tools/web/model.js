// A converted file: its metadata, which ONNX Runtime Web does not show, and a session that explains.

import { Refusal, preprocessing } from "./photo.js";

let runtime;

/** ONNX Runtime Web, loaded once, off the page's own thread. */
async function load() {
  try {
    const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs");
    ort.env.wasm.proxy = true; // in a worker, so that the page stays alive
    ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 4) : 1;
    return ort;
  } catch {
    throw new Refusal("onnxruntime-web is not next to this page: run npm install in its folder");
  }
}

/** Reads a converted file and makes a session of it. */
export async function open(bytes, name) {
  const metadata = metadataOf(bytes, name);
  const said = (key) => metadata.get(`onnxgbp.${key}`);
  if (said("method") === undefined) {
    throw new Refusal(`${name} gives no attribution: convert it first, onnxgbp convert --target input --profile portable`);
  }
  if (said("target") !== "input" && said("target") !== "argmax") {
    throw new Refusal(`${name} was converted with --target ${said("target")}: this page needs --target input`);
  }
  runtime ??= load();
  let ort;
  try {
    ort = await runtime;
  } catch (error) {
    runtime = undefined; // the next model tries again
    throw error;
  }
  let session;
  try {
    session = await ort.InferenceSession.create(bytes);
  } catch (error) {
    throw new Refusal(`the runtime cannot load ${name}: ${oneLine(error)}`);
  }
  const inputs = session.inputMetadata.filter(({ name }) => name !== "target" || said("target") !== "input");
  const wrt = JSON.parse(said("wrt"));
  if (inputs.length !== 1 || inputs[0].shape?.length !== 4 || wrt.length !== 1 || wrt[0] !== inputs[0].name) {
    throw new Refusal(`${name} does not attribute to one image input: this page has nothing to draw`);
  }
  return {
    name,
    method: said("method"),
    explained: said("explained"),
    chooses: said("target") === "input",
    labels: JSON.parse(said("labels") ?? "[]"),
    prepared: preprocessing(said("preprocessing"), inputs[0].shape),
    async explain({ values, shape }, target) {
      const feeds = { [inputs[0].name]: new ort.Tensor("float32", values, shape) };
      if (this.chooses) feeds.target = new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]);
      try {
        const results = await session.run(feeds);
        if (results.attribution?.dims.length !== 4) {
          throw new Refusal(`${name} gives several maps, or none of the form of a picture: convert it for one of each`);
        }
        return {
          attribution: results.attribution.data,
          shape: results.attribution.dims,
          target: Number(results.attribution_target.data[0]),
          scores: results[session.outputNames[0]].data,
        };
      } catch (error) {
        if (error instanceof Refusal) throw error;
        throw new Refusal(`the runtime cannot run ${name}: ${oneLine(error)}`);
      }
    },
  };
}

function oneLine(error) {
  return String(error?.message ?? error).split("\n")[0];
}

const METADATA_FIELD = 14; // metadata_props of ModelProto: entries of a key (1) and a value (2)

/** The metadata of an .onnx file, a Map of texts. Everything else in the file is stepped over. */
export function metadataOf(bytes, name = "the file") {
  const metadata = new Map();
  try {
    for (const [field, entry] of fields(bytes)) {
      if (field !== METADATA_FIELD) continue;
      const parts = new Map([...fields(entry)].map(([key, text]) => [key, new TextDecoder().decode(text)]));
      metadata.set(parts.get(1) ?? "", parts.get(2) ?? "");
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new Refusal(`${name} is no ONNX file, or a damaged one`);
  }
  return metadata;
}

/** The length-delimited fields of a protobuf message, as [number, bytes]. RangeError where it is none. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      if (at >= bytes.length) throw new RangeError("cut off");
      const byte = bytes[at++];
      value += (byte & 127) * 2 ** shift; // no shift operator: lengths may pass 31 bits
      if (byte < 128) return value;
    }
    throw new RangeError("not a number");
  };
  while (at < bytes.length) {
    const tag = varint();
    const [field, kind] = [Math.floor(tag / 8), tag % 8];
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      at += length;
      if (at > bytes.length) throw new RangeError("cut off");
      yield [field, bytes.subarray(at - length, at)];
    } else throw new RangeError("no protobuf");
  }
  if (at > bytes.length) throw new RangeError("cut off");
}
