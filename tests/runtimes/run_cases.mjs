// What Node and a browser share: runs every case with an ONNX Runtime, whichever it is.

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

/** `read(file)` gives bytes, `write(file, bytes)` takes them; both may be asynchronous. options: of the session. */
export async function resultsOf(ort, cases, read, write, options = {}) {
  const results = {};
  for (const { name, model, inputs, outputs } of cases) {
    try {
      const session = await ort.InferenceSession.create(await read(model), options);
      const feeds = {};
      for (const [input, { file, dtype, shape }] of Object.entries(inputs)) {
        const bytes = await read(file);
        feeds[input] = new ort.Tensor(dtype, new ARRAYS[dtype](bytes.slice().buffer), shape);
      }
      const values = await session.run(feeds, outputs);
      const told = {};
      for (const output of outputs) {
        const { data, dims, type } = values[output];
        const file = `${name}.${output}.out`;
        await write(file, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
        told[output] = { file, dtype: type, shape: dims };
      }
      results[name] = { outputs: told };
      await session.release();
    } catch (error) {
      results[name] = { error: String(error) };
    }
  }
  return results;
}
