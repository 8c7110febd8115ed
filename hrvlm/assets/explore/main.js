// What is chosen and shown, and what mouse, touch and keys do about it.

const get = (id) => document.getElementById(id);
const data = readData(get("data"));
const gallery = get("gallery");
const heat = scaleColors(data.heat);
const values = new Float32Array(data.patches); // similarity of each patch to the chosen one
const state = { mode: "similarity", chosen: null, matching: false, pair: [], covered: true, height: 0 };
const matchesOf = new Map();
const tiles = data.images.map((image) =>
  makeTile(image, gallery, { choose, drag, under, leave: () => under(), key: moveByKey, apart, partner })
);
const svg = makeLines(gallery);
const attentionRange = rangeOfAttention();

/** Choose a patch: the heart of the page. */
function choose(image, row, column) {
  const index = row * image.columns + column;
  state.chosen = { image, index };
  similarities(data, image.first + index, values);
  if (state.matching && state.pair[0] !== image) state.pair = [image, state.pair[0]];
  draw();
  if (state.matching) showMatches();
  announceSoon(() => describe(image, index));
}

let waiting = null;
/** As `choose`, at most once a frame. */
function drag(...patch) {
  if (!waiting) {
    requestAnimationFrame(() => {
      choose(...waiting);
      waiting = null;
    });
  }
  waiting = patch;
}

function draw() {
  const quiet = state.matching ? 0.55 : 1; // for the lines
  const strength = state.covered ? (quiet * get("strength").value) / 100 : 0;
  const { low, high } = scale();
  for (const tile of tiles) {
    const { image, canvas, stage } = tile;
    stage.classList.toggle("coloured", strength > 0);
    stage.classList.toggle("heated", strength > 0 && state.mode !== "pca");
    if (state.mode === "pca") paintColors(canvas, image.colors, strength);
    else if (state.mode === "attention") paintHeat(canvas, image.attention, 0, low, high, heat, strength);
    else paintHeat(canvas, values, image.first, low, high, heat, strength);
    mark(tile);
  }
  drawLegend(low, high);
  under(...looked);
}

/** Where the colours begin and end. */
function scale() {
  if (state.mode === "attention") return attentionRange;
  const low = quickQuantile(values, 0.02);
  return { low: Math.min(low, 0.99), high: 1 };
}

function rangeOfAttention() {
  if (!data.images[0].attention) return null;
  const all = new Float32Array(data.patches);
  for (const image of data.images) all.set(image.attention, image.first);
  const low = quantile(all, 0.01);
  return { low, high: Math.max(quantile(all, 0.99), low + 1e-3) };
}

/** The chosen patch, or the one that is most like it. */
function mark(tile) {
  const { image, marks, best } = tile;
  const own = state.chosen.image === image;
  const match = largest(values, image.first, image.count);
  const shown = state.mode === "similarity" && state.covered;
  marks.chosen.hidden = !own;
  marks.ring.hidden = own || !shown;
  if (own) place(tile, "chosen", state.chosen.index);
  else if (shown) place(tile, "ring", match - image.first);
  best.textContent = own || !shown ? "" : `best ${number(values[match])}`;
  best.title = "Similarity of its most similar patch";
}

const number = (value) => value.toFixed(2).replace("-", "\u2212");
const share = (value) => `${value.toFixed(value < 10 ? 1 : 0)}\u00d7`;

function drawLegend(low, high) {
  const written = state.mode === "attention" ? share : number;
  get("legend-name").textContent = {
    similarity: "cosine similarity to the marked patch",
    attention: "attention of CLS, against an even share",
    pca: "the first three principal components as red, green and blue: equal colours are equal features",
  }[state.mode];
  get("scale").hidden = state.mode === "pca";
  get("low").textContent = written(low);
  get("high").textContent = written(high);
  get("scale").setAttribute("aria-label", `colours from dark, ${written(low)}, to bright, ${written(high)}`);
}

let looked = [];
/** What lies under the mouse, or nothing. */
function under(...patch) {
  looked = patch;
  const [image, row, column] = patch;
  for (const tile of tiles) tile.marks.under.hidden = true;
  const needle = get("needle");
  needle.hidden = true;
  get("readout").textContent = "";
  if (!image) return;
  const index = row * image.columns + column;
  place(tiles[image.index], "under", index);
  const value = valueAt(image, index);
  const where = `${image.name}, row ${row + 1}, column ${column + 1}`;
  get("readout").textContent = value === null ? where : `${where}: ${value.text}`;
  if (value === null) return;
  const { low, high } = scale();
  needle.style.left = `${Math.max(0, Math.min(1, (value.value - low) / (high - low))) * 100}%`;
  needle.hidden = false;
}

function valueAt(image, index) {
  if (state.mode === "pca") return null;
  const value = state.mode === "attention" ? image.attention[index] : values[image.first + index];
  return { value, text: state.mode === "attention" ? share(value) : number(value) };
}

/** A patch and its nearest elsewhere, in words. */
function describe(image, index) {
  const at = (i, patch) => `row ${Math.floor(patch / i.columns) + 1}, column ${(patch % i.columns) + 1}`;
  const words = [`${image.name}, ${at(image, index)}.`];
  if (state.mode === "attention") words.push(`Attention: ${share(image.attention[index])} an even share.`);
  const other = nearestImage(image);
  if (other) {
    const match = largest(values, other.first, other.count);
    words.push(`Most similar elsewhere: ${other.name}, ${at(other, match - other.first)}, ${number(values[match])}.`);
  }
  return words.join(" ");
}

let timer = 0;
/** Say something to a screen reader once the hand rests. */
function announceSoon(words) {
  clearTimeout(timer);
  timer = setTimeout(() => (get("live").textContent = words()), 350);
}

/** The other image with the patch most like the chosen one. */
function nearestImage(image) {
  let found = null;
  let best = -2;
  for (const other of data.images) {
    if (other === image) continue;
    const value = values[largest(values, other.first, other.count)];
    if (value > best) [found, best] = [other, value];
  }
  return found;
}

function setMode(mode) {
  if (mode === "attention" && !attentionRange) return;
  state.mode = mode;
  document.querySelector(`#modes [value="${mode}"]`).checked = true;
  draw();
  announceSoon(() => `Colours show ${get("legend-name").textContent}.`);
}

function setMatching(matching) {
  if (data.images.length < 2) return;
  state.matching = matching;
  get("matches").setAttribute("aria-pressed", String(matching));
  draw();
  if (matching) return partner(nearestImage(state.chosen.image));
  clearLines(svg);
  gallery.classList.remove("matching");
}

/** Whether an image stands outside the pair that is matched. */
function apart(image) {
  return state.matching && !state.pair.includes(image);
}

/** Match the chosen patch's image with this one. */
function partner(image) {
  state.pair = [state.chosen.image, image];
  showMatches();
}

function nextPartner() {
  const count = data.images.length;
  let next = (state.pair[1].index + 1) % count;
  if (next === state.chosen.image.index) next = (next + 1) % count;
  partner(data.images[next]);
}

const pairInOrder = () => [...state.pair].sort((x, y) => x.index - y.index);
const pairKey = (a, b) => `${a.index} ${b.index}`;

let search = 0;
/** Lines between the two images of the pair, as soon as they are found. */
function showMatches() {
  gallery.classList.add("matching");
  for (const { image, figure, stage } of tiles) {
    figure.classList.toggle("apart", apart(image));
    stage.title = apart(image) ? "Match with this picture" : "";
  }
  const [a, b] = pairInOrder();
  const key = pairKey(a, b);
  const mine = ++search;
  if (matchesOf.has(key)) return drawMatches(a, b, matchesOf.get(key));
  drawMatches(a, b, []);
  const steps = mutualMatches(data, a, b);
  const goOn = () => {
    if (mine !== search || !state.matching) return;
    const end = performance.now() + 10;
    let step;
    do step = steps.next();
    while (!step.done && performance.now() < end);
    if (!step.done) return void setTimeout(goOn);
    matchesOf.set(key, step.value);
    drawMatches(a, b, step.value);
    const count = step.value.length;
    announceSoon(() => `${count} matching patches in ${a.name} and ${b.name}.`);
  };
  setTimeout(goOn);
}

/** The lines of a pair, and the one of the chosen patch. */
function drawMatches(a, b, matches) {
  const { image, index } = state.chosen;
  const other = image === a ? b : a;
  const to = largest(values, other.first, other.count) - other.first;
  const own = image === a ? { from: index, to } : { from: to, to: index };
  drawLines(svg, gallery, tiles[a.index], tiles[b.index], matches, own);
}

function redrawMatches() {
  if (!state.matching) return;
  const [a, b] = pairInOrder();
  drawMatches(a, b, matchesOf.get(pairKey(a, b)) ?? []);
}

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
/** Move the choice; in another picture it begins at the patch most like the one before. */
function moveByKey(image, event) {
  const move = MOVES[event.key];
  if (apart(image) && ["Enter", " "].includes(event.key)) {
    event.preventDefault();
    return partner(image);
  }
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (state.chosen.image !== image) {
    const match = largest(values, image.first, image.count) - image.first;
    return choose(image, Math.floor(match / image.columns), match % image.columns);
  }
  const step = event.shiftKey ? 5 : 1;
  const within = (at, count) => Math.max(0, Math.min(count - 1, at));
  const row = within(Math.floor(state.chosen.index / image.columns) + step * move[0], image.rows);
  const column = within((state.chosen.index % image.columns) + step * move[1], image.columns);
  choose(image, row, column);
}

const KEYS = {
  1: () => setMode("similarity"),
  2: () => setMode("pca"),
  3: () => setMode("attention"),
  m: () => setMatching(!state.matching),
  n: () => state.matching && nextPartner(),
  o: () => toggleCover(),
  "+": () => resize(1.25),
  "=": () => resize(1.25),
  "-": () => resize(0.8),
  "?": () => get("help").showModal(),
};

function toggleCover() {
  state.covered = !state.covered;
  draw();
}

function resize(factor) {
  state.height = Math.max(70, Math.min(1600, state.height * factor));
  sizeTiles(tiles, state.height);
  redrawMatches();
}

/** A height at which the pictures fill the window and no more, if they can. */
function fittingHeight() {
  const room = Math.max(260, window.innerHeight - 230);
  let area = 0;
  let tallest = 1; // in heights of a row
  for (const { image } of tiles) {
    const width = widthOf(image);
    area += (width * width) / image.aspect;
    tallest = Math.max(tallest, width / image.aspect);
  }
  const fitting = 0.85 * Math.sqrt(((window.innerWidth - 48) * room) / area);
  return Math.max(150, Math.min(room / tallest, 640, fitting));
}

function listenToControls() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || get("help").open) return;
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : ""];
    if (!act) return;
    event.preventDefault();
    act();
  });
  get("modes").addEventListener("change", (event) => setMode(event.target.value));
  get("matches").addEventListener("click", () => setMatching(!state.matching));
  get("strength").addEventListener("input", () => {
    state.covered = true;
    draw();
  });
  get("smaller").addEventListener("click", () => resize(0.8));
  get("larger").addEventListener("click", () => resize(1.25));
  get("help-button").addEventListener("click", () => get("help").showModal());
  new ResizeObserver(redrawMatches).observe(gallery);
}

function writeFacts() {
  const count = data.patches.toLocaleString("en");
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  get("about").textContent = [data.about, many(data.images.length, "image"), `${count} patches`]
    .filter(Boolean)
    .join(" \u00b7 ");
  const which =
    data.compared === data.patches ? "all pairs compared" : `${data.compared} patches compared with all ${count}`;
  get("facts").textContent =
    `${data.components} of ${data.width} principal components in int8: ${(100 * data.varianceKept).toFixed(1)} % of ` +
    `the variance kept, similarities right to within ${data.largestError.toFixed(3)} (${which})`;
  get("bar").style.background = `linear-gradient(90deg, ${data.heat.map((c) => `rgb(${c.join(" ")})`).join(", ")})`;
  get("matches").hidden = data.images.length < 2;
  document.querySelector('#modes [value="attention"]').parentElement.hidden = !attentionRange;
}

/** The patch that is chosen first. */
function beginning() {
  if (data.start) return [data.images[data.start[0]], data.start[1], data.start[2]];
  const image = data.images[0];
  if (!image.attention) return [image, image.rows >> 1, image.columns >> 1];
  const index = largest(image.attention, 0, image.count);
  return [image, Math.floor(index / image.columns), index % image.columns];
}

writeFacts();
listenToControls();
state.height = fittingHeight();
resize(1);
choose(...beginning());

// For the console, and the tests.
window.explorer = {
  data,
  state,
  /** Of an image's patches to the chosen one. */
  similarities(index) {
    const { first, count } = data.images[index];
    return values.slice(first, first + count);
  },
  /** What the lines join, {from, to, value} in patches of the pair, the image that stands first first. */
  matches: () => matchesOf.get(pairKey(...pairInOrder())),
};
