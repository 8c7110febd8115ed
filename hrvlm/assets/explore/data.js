// What the page was written with: pictures, names, and a vector for each patch of all images.

function bytesOf(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/**
 * The data block. `vectors` is [patches, stride], the components and zeros up to a multiple of four; the
 * product of two rows is their similarity.
 */
function readData(element) {
  const data = JSON.parse(element.textContent);
  element.textContent = "";
  const width = data.components;
  const stride = 4 * Math.ceil(width / 4);
  const vectors = new Float32Array(data.patches * stride);
  let first = 0;
  data.images.forEach((image, index) => {
    const values = new Int8Array(bytesOf(image.values).buffer);
    for (let i = 0, at = first * stride; i < values.length; at += stride) {
      for (let k = 0; k < width; k++) vectors[at + k] = values[i++] * data.scales[k];
    }
    image.index = index;
    image.first = first;
    image.count = image.rows * image.columns;
    image.colors = bytesOf(image.colors);
    if (image.attention) {
      // Times an even share: weights of images of different sizes can then be compared.
      image.attention = new Float32Array(bytesOf(image.attention).buffer).map((w) => w * image.count);
    }
    delete image.values;
    first += image.count;
  });
  data.vectors = vectors;
  data.stride = stride;
  return data;
}
