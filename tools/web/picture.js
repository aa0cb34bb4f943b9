// Arrays -> pixels and files. Zero is one neutral colour, and the scale is symmetric about it.

const PERCENTILE = 99.5; // of |value|: a few outliers would leave the rest of a map invisible

// Blue (negative) over near-white (zero) to red (positive): two hues that no common colour blindness confuses.
const SIGNED = [
  [5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247],
  [253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31],
];

/** -1 to 1 as [red, green, blue]. */
export function diverging(value) {
  const place = ((Math.min(Math.max(value, -1), 1) + 1) / 2) * (SIGNED.length - 1);
  const index = Math.min(Math.floor(place), SIGNED.length - 2);
  const share = place - index;
  return SIGNED[index].map((low, c) => low + (SIGNED[index + 1][c] - low) * share);
}

/** An attribution [1, C, H, W] or [1, H, W, C] in pixel order: one array of H * W values for each channel. */
export function planes(attribution, [, ...dims], layout) {
  const depth = layout === "nhwc" ? dims[2] : dims[0];
  const area = attribution.length / depth;
  return Array.from({ length: depth }, (_, c) =>
    Float32Array.from({ length: area }, (_, i) => {
      const value = attribution[layout === "nhwc" ? i * depth + c : c * area + i];
      return Number.isFinite(value) ? value : 0;
    }),
  );
}

/** The map scaled to -1..1: `values`, one array per drawn channel, and `clip`, the |value| in full colour. */
export function scaled(channels, view) {
  const drawn = view === "signed" ? [channels.reduce((sum, one) => sum.map((value, i) => value + one[i]))] : channels;
  const sorted = Float32Array.from(drawn.flatMap((plane) => Array.from(plane, Math.abs))).sort();
  const nonzero = sorted.subarray(sorted.findIndex((value) => value > 0));
  const clip = percentile(sorted) || (sorted.at(-1) > 0 ? percentile(nonzero) : 0);
  return { clip, values: drawn.map((plane) => plane.map((value) => (clip ? clamp(value / clip) : 0))) };
}

const clamp = (value) => Math.min(Math.max(value, -1), 1);

function percentile(sorted) {
  const place = (PERCENTILE / 100) * (sorted.length - 1);
  const below = Math.floor(place);
  return sorted[below] + ((sorted[below + 1] ?? sorted[below]) - sorted[below]) * (place - below);
}

/** The colour of each pixel of a scaled map; three channels are drawn as in the papers, mid-grey for zero. */
function colour({ values }, order, i) {
  if (values.length === 1) return diverging(values[0][i]);
  return order.map((c) => 128 + 127 * values[c][i]);
}

const strength = ({ values }, i) => Math.max(...values.map((plane) => Math.abs(plane[i])));

/** RGBA of the map alone. order: where red, green and blue stand among three channels. */
export function mapPixels(map, order, width, height) {
  return paint(width, height, (i) => colour(map, order, i));
}

/** RGBA of the map on the photo, which pales as the opacity (0 to 1) grows; the map covers more where it is stronger. */
export function overlayPixels(map, order, { width, height, pixels }, opacity) {
  return paint(width, height, (i) => {
    const rgb = pixels.subarray(3 * i, 3 * i + 3);
    const pale = 150 + 0.4 * (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]);
    const cover = opacity * strength(map, i) ** 0.4;
    return colour(map, order, i).map((value, c) => {
      const ground = rgb[c] + opacity * (pale - rgb[c]);
      return ground + (value - ground) * cover;
    });
  });
}

/** RGBA of a photo as it is. */
export function photoPixels({ width, height, pixels }) {
  return paint(width, height, (i) => pixels.subarray(3 * i, 3 * i + 3));
}

function paint(width, height, rgb) {
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    image.data.set(Array.from(rgb(i), Math.round), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** A float32 array as numpy's .npy file. */
export function npy(values, shape) {
  const told = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const head = told.padEnd(Math.ceil((told.length + 11) / 64) * 64 - 11) + "\n";
  const start = new Uint8Array(10);
  start.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, head.length & 255, head.length >> 8]);
  return new Blob([start, head, new Uint8Array(values.buffer, values.byteOffset, values.byteLength)]);
}
