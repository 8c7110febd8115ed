// Patches of two images that are each other's best match.

const MOST_MATCHES = 24;
const MOST_ASKED = 1024; // patches of the first image that look for their match

/** Yields now and then, so that the page stays awake; returns [{from, to, value}], best first. */
function* mutualMatches(data, a, b) {
  const step = Math.max(1, Math.ceil(Math.sqrt(a.count / MOST_ASKED)));
  const there = new Float32Array(b.count);
  const back = new Float32Array(a.count);
  const found = [];
  for (let row = step >> 1; row < a.rows; row += step) {
    for (let column = step >> 1; column < a.columns; column += step) {
      const from = row * a.columns + column;
      similarities(data, a.first + from, there, b.first, b.first + b.count);
      const to = largest(there, 0, b.count);
      found.push({ from, to, value: there[to] });
    }
    yield;
  }
  found.sort((x, y) => y.value - x.value);
  const kept = [];
  for (const match of found) {
    if (kept.length === MOST_MATCHES) break;
    if (kept.some((k) => near(a, k.from, match.from) || near(b, k.to, match.to))) continue;
    similarities(data, b.first + match.to, back, a.first, a.first + a.count);
    const home = largest(back, 0, a.count);
    if (distance(a, home, match.from) >= step) continue;
    kept.push(match);
    yield;
  }
  return kept;
}

function distance(image, i, j) {
  const rows = Math.floor(i / image.columns) - Math.floor(j / image.columns);
  return Math.max(Math.abs(rows), Math.abs((i % image.columns) - (j % image.columns)));
}

/** Whether two patches are so near that a line from each says the same twice. */
function near(image, i, j) {
  return distance(image, i, j) <= Math.max(image.rows, image.columns) / 14;
}
