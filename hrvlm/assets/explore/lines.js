// Lines between the matching patches of two pictures, over the gallery.

function makeLines(gallery) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.id = "lines";
  svg.setAttribute("aria-hidden", "true");
  gallery.append(svg);
  return svg;
}

function clearLines(svg) {
  svg.replaceChildren();
}

/** Draw matches from tile `a` to tile `b`, each in the colour of its principal components; `own` in white. */
function drawLines(svg, gallery, a, b, matches, own) {
  const box = gallery.getBoundingClientRect();
  svg.setAttribute("width", box.width);
  svg.setAttribute("height", box.height);
  const parts = [];
  for (const match of [...matches, own]) {
    const { from, to } = match;
    const [x1, y1] = middleOf(a, from, box);
    const [x2, y2] = middleOf(b, to, box);
    const [r, g, blue] = a.image.colors.subarray(3 * from, 3 * from + 3);
    const color = match === own ? "#fff" : `rgb(${r} ${g} ${blue})`;
    for (const [kind, stroke] of [["edge", null], ["line", color]]) {
      parts.push(shape("path", { class: kind, d: `M${x1} ${y1}L${x2} ${y2}`, stroke }));
    }
    for (const [cx, cy] of [[x1, y1], [x2, y2]]) {
      parts.push(shape("circle", { cx, cy, r: 4, fill: color }));
    }
  }
  svg.replaceChildren(...parts);
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  return made;
}

function middleOf({ image, stage }, index, box) {
  const own = stage.getBoundingClientRect();
  const row = Math.floor(index / image.columns);
  const column = index % image.columns;
  return [
    own.left - box.left + ((column + 0.5) / image.columns) * own.width,
    own.top - box.top + ((row + 0.5) / image.rows) * own.height,
  ];
}
