// A photo -> the model's input, as onnxgbp/images.py does it, number for number.

/** What a file of the user's may say wrong: shown on the page as it is. */
export class Refusal extends Error {}

/** The photo as RGB bytes: upright, transparency laid on white. */
export async function decode(blob) {
  let bitmap;
  try {
    // The numbers in the file, not what a colour profile makes of them: Pillow reads them so.
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  } catch {
    throw new Refusal(`${blob.name ?? "the file"} is not an image that this browser reads`);
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  if (!context) throw new Refusal(`a photo of ${width} x ${height} is too large for this browser`);
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    pixels[to++] = rgba[from];
    pixels[to++] = rgba[from + 1];
    pixels[to++] = rgba[from + 2];
  }
  return { width, height, pixels };
}

/** Preprocessing as the model's metadata has it, with the defaults of onnxgbp for what it leaves out. */
export function preprocessing(text, shape) {
  const nhwc = (dims) => [1, 3].includes(dims[3]) && ![1, 3].includes(dims[1]);
  const said = text === undefined ? {} : JSON.parse(text);
  const layout = said.layout ?? (nhwc(shape) ? "nhwc" : "nchw");
  const [height, width, depth] = layout === "nhwc" ? shape.slice(1) : [shape[2], shape[3], shape[1]];
  const fixed = typeof height === "number" && typeof width === "number" ? [height, width] : null;
  const crop = said.crop === undefined || said.crop === null ? fixed : [said.crop].flat();
  if (crop?.length === 1) crop.push(crop[0]);
  const fitting = crop && (crop[0] === crop[1] ? crop[0] : Math.max(...crop));
  return {
    size: said.size ?? fitting ?? null,
    crop,
    channels: said.channels ?? (depth === 1 ? "grey" : "rgb"),
    scale: said.scale ?? 1 / 255,
    mean: [said.mean ?? 0].flat(),
    std: [said.std ?? 1].flat(),
    layout,
  };
}

/** The photo as the model sees it: resized and cropped, RGB bytes. */
export function cropped(photo, { size, crop }) {
  let seen = size === null ? photo : shorterSide(photo, size);
  if (crop === null) return seen;
  const [height, width] = crop;
  if (seen.width < width || seen.height < height) {
    throw new Refusal(`the photo is ${seen.width} x ${seen.height}, smaller than the ${width} x ${height} of the model`);
  }
  return cut(seen, halfEven((seen.width - width) / 2), halfEven((seen.height - height) / 2), width, height);
}

/** The model's input for one cropped photo: a Float32Array and its shape, with a batch of one. */
export function prepare({ width, height, pixels }, { channels, scale, mean, std, layout }) {
  const depth = channels === "grey" ? 1 : 3;
  const values = new Float32Array(width * height * depth);
  const area = width * height;
  for (let c = 0; c < depth; c++) {
    // In float32 at every step, like numpy.
    const [factor, offset, divisor] = [scale, mean[c] ?? mean[0], std[c] ?? std[0]].map(Math.fround);
    for (let i = 0; i < area; i++) {
      const pixel = depth === 1 ? luma(pixels, 3 * i) : pixels[3 * i + (channels === "bgr" ? 2 - c : c)];
      const value = Math.fround(Math.fround(Math.fround(pixel * factor) - offset) / divisor);
      values[layout === "nhwc" ? i * depth + c : c * area + i] = value;
    }
  }
  return { values, shape: layout === "nhwc" ? [1, height, width, depth] : [1, depth, height, width] };
}

/** Rec. 601 luma in 16-bit fixed point. */
function luma(pixels, i) {
  return (19595 * pixels[i] + 38470 * pixels[i + 1] + 7471 * pixels[i + 2] + 32768) >> 16;
}

const WIDEST = 8; // a longer side of more than this many shorter ones is trimmed before it is resized

function shorterSide(photo, size) {
  const shorter = Math.min(photo.width, photo.height);
  const [width, height] = [photo.width, photo.height].map((side) => Math.min(side, WIDEST * shorter));
  const left = Math.floor((photo.width - width) / 2);
  const top = Math.floor((photo.height - height) / 2);
  const trimmed = width < photo.width || height < photo.height ? cut(photo, left, top, width, height) : photo;
  const [w, h] = [width, height].map((side) => (side === shorter ? size : halfEven((side * size) / shorter)));
  return resize(trimmed, w, h);
}

/** Python's round: a half goes to the even neighbour. */
export function halfEven(x) {
  const below = Math.floor(x);
  return x - below === 0.5 ? below + (below % 2) : Math.round(x);
}

function cut({ width, pixels }, left, top, w, h) {
  const kept = new Uint8Array(w * h * 3);
  for (let y = 0; y < h; y++) {
    const start = ((top + y) * width + left) * 3;
    kept.set(pixels.subarray(start, start + w * 3), y * w * 3);
  }
  return { width: w, height: h, pixels: kept };
}

const BITS = 22; // of the fixed-point weights

/** Bilinear, widened by the factor when shrinking: rows first, then columns, rounded to bytes after each. */
export function resize({ width, height, pixels }, w, h) {
  const across = w === width ? pixels : pass(pixels, weights(width, w), height, [3, width * 3], [3, w * 3]);
  const down = h === height ? across : pass(across, weights(height, h), w, [w * 3, 3], [w * 3, 3]);
  return { width: w, height: h, pixels: down };
}

/** One filter along an axis; `from` and `to` are the steps along it and from one line to the next. */
function pass(pixels, taps, lines, from, to) {
  const result = new Uint8Array(taps.length * lines * 3);
  for (let line = 0; line < lines; line++) {
    taps.forEach(({ start, numbers }, place) => {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** (BITS - 1);
        let at = line * from[1] + start * from[0] + c;
        for (const number of numbers) {
          sum += pixels[at] * number;
          at += from[0];
        }
        result[line * to[1] + place * to[0] + c] = Math.min(Math.max(Math.floor(sum / 2 ** BITS), 0), 255);
      }
    });
  }
  return result;
}

/** For each new place, where its triangle starts on the old axis and its weights, which add up to 1. */
function weights(before, after) {
  const scale = before / after;
  const reach = Math.max(scale, 1);
  return Array.from({ length: after }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const start = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), before);
    const heights = [];
    for (let x = start; x < end; x++) heights.push(Math.max(1 - Math.abs((x - centre + 0.5) / reach), 0));
    const total = heights.reduce((sum, one) => sum + one, 0);
    return { start, numbers: heights.map((one) => Math.round((one / total) * 2 ** BITS)) };
  });
}
