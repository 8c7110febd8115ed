// Cosine similarity, and where the scale of a map begins and ends.

/** Similarity of the patch `index` with patches `from` to `to`, written to `out` from 0 on. */
function similarities(data, index, out, from = 0, to = data.patches) {
  const { vectors, stride } = data;
  const query = vectors.slice(index * stride, (index + 1) * stride);
  for (let i = from, at = from * stride; i < to; i++) {
    // Four sums at a time: none waits for the one before.
    let [a, b, c, d] = [0, 0, 0, 0];
    for (let k = 0; k < stride; k += 4, at += 4) {
      a += query[k] * vectors[at];
      b += query[k + 1] * vectors[at + 1];
      c += query[k + 2] * vectors[at + 2];
      d += query[k + 3] * vectors[at + 3];
    }
    const sum = a + b + (c + d);
    out[i - from] = sum > 1 ? 1 : sum < -1 ? -1 : sum;
  }
  if (index >= from && index < to) out[index - from] = 1; // known, whatever 64 components keep of it
  return out;
}

/** The place of the largest of `count` values from `first` on. */
function largest(values, first, count) {
  let best = first;
  for (let i = first + 1; i < first + count; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** The value that this share of all values lies below. */
function quantile(values, share) {
  const sorted = Float32Array.from(values).sort();
  return sorted[Math.round(share * (sorted.length - 1))];
}

/** As `quantile`, for many values between -1 and 1, to a step of 1/512: fast enough for each click. */
function quickQuantile(values, share) {
  const counts = new Uint32Array(1025);
  for (let i = 0; i < values.length; i++) counts[((values[i] + 1) * 512) | 0]++;
  let left = share * values.length;
  let step = 0;
  while (step < 1024 && (left -= counts[step]) > 0) step++;
  return step / 512 - 1;
}
