// Values to colours of pixels.

const STEPS = 256;

/** Colours of the scale from 0 to 1, r, g and b of each step, between the stops in equal parts. */
function scaleColors(stops) {
  const colors = new Uint8Array(3 * STEPS);
  for (let i = 0; i < STEPS; i++) {
    const position = (i / (STEPS - 1)) * (stops.length - 1);
    const below = Math.min(Math.floor(position), stops.length - 2);
    const part = position - below;
    for (let k = 0; k < 3; k++) {
      colors[3 * i + k] = Math.round(stops[below][k] * (1 - part) + stops[below + 1][k] * part);
    }
  }
  return colors;
}

/** Canvases are of a pixel a patch: small, and written by the processor. */
const contextOf = (canvas) => canvas.getContext("2d", { willReadFrequently: true });

/** Paint values: low ones let the picture through, high ones cover it. */
function paintHeat(canvas, values, first, low, high, colors, strength) {
  const context = contextOf(canvas);
  const pixels = context.createImageData(canvas.width, canvas.height);
  const scale = (STEPS - 1) / Math.max(high - low, 1e-6);
  const bytes = pixels.data;
  for (let i = first, at = 0; at < bytes.length; i++, at += 4) {
    const step = Math.max(0, Math.min(STEPS - 1, Math.round((values[i] - low) * scale)));
    bytes[at] = colors[3 * step];
    bytes[at + 1] = colors[3 * step + 1];
    bytes[at + 2] = colors[3 * step + 2];
    bytes[at + 3] = 255 * Math.min(1, strength * (0.6 + (0.35 * step) / STEPS));
  }
  context.putImageData(pixels, 0, 0);
}

/** Paint colours [rows * columns, 3]. */
function paintColors(canvas, colors, strength) {
  const context = contextOf(canvas);
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let i = 0, at = 0; i < colors.length; at += 4) {
    pixels.data[at] = colors[i++];
    pixels.data[at + 1] = colors[i++];
    pixels.data[at + 2] = colors[i++];
    pixels.data[at + 3] = 255 * 0.85 * strength;
  }
  context.putImageData(pixels, 0, 0);
}
