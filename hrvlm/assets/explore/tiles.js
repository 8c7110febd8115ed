// The pictures: a figure for each, with its colours, marks and caption.

function element(name, className, parent) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (parent) parent.append(made);
  return made;
}

/** A figure in the gallery; `act` is told what is done to it. */
function makeTile(image, gallery, act) {
  const figure = element("figure", "", gallery);
  const stage = element("div", "stage", figure);
  stage.tabIndex = 0;
  stage.setAttribute("role", "application");
  stage.setAttribute("aria-roledescription", "map of patches");
  stage.setAttribute(
    "aria-label",
    `${image.name}${image.note ? `, ${image.note}` : ""}, ${image.rows} rows and ${image.columns} columns of patches. ` +
      "The arrow keys choose one."
  );
  stage.style.aspectRatio = String(image.aspect);
  const picture = element("img", "", stage);
  picture.alt = "";
  picture.src = image.picture;
  const canvas = element("canvas", "", stage);
  canvas.width = image.columns;
  canvas.height = image.rows;
  canvas.setAttribute("aria-hidden", "true");
  const caption = element("figcaption", "", figure);
  const name = element("span", "name", caption);
  name.textContent = image.name;
  name.title = image.name;
  element("span", "note", caption).textContent = image.note;
  const best = element("span", "best", caption);
  const marks = {};
  for (const mark of ["under", "chosen", "ring"]) {
    marks[mark] = element("div", mark, stage);
    marks[mark].hidden = true;
  }
  const tile = { image, figure, stage, canvas, best, marks };
  listen(tile, act);
  return tile;
}

function listen({ image, stage }, act) {
  const patchAt = (event) => {
    const box = stage.getBoundingClientRect();
    const place = (at, start, length, count) =>
      Math.max(0, Math.min(count - 1, Math.floor(((at - start) / length) * count)));
    return [
      place(event.clientY, box.top, box.height, image.rows),
      place(event.clientX, box.left, box.width, image.columns),
    ];
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch" || event.button || act.apart(image)) return; // a finger may want to scroll
    stage.setPointerCapture(event.pointerId);
    act.choose(image, ...patchAt(event));
  });
  stage.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    if (stage.hasPointerCapture(event.pointerId)) act.drag(image, ...patchAt(event));
    act.under(image, ...patchAt(event));
  });
  stage.addEventListener("pointerleave", () => act.leave());
  let lastPointer = "mouse";
  stage.addEventListener("pointerup", (event) => (lastPointer = event.pointerType));
  stage.addEventListener("click", (event) => {
    if (act.apart(image)) act.partner(image);
    else if (lastPointer === "touch") act.choose(image, ...patchAt(event));
  });
  stage.addEventListener("keydown", (event) => act.key(image, event));
}

/** Width of a picture in a row of height 1; tall ones are made wider, wide ones less wide, than they would be. */
const widthOf = (image) => Math.min(3.2, Math.max(0.5, image.aspect));

/** Give the figures a basis of one height. */
function sizeTiles(tiles, height) {
  for (const { image, figure, stage } of tiles) {
    const width = widthOf(image) * height;
    stage.classList.toggle("coarse", width > 2 * image.pixels); // sharp pixels rather than a blur
    figure.style.flex = `${width} 1 ${width}px`;
    figure.style.maxWidth = `${width * 2.2}px`;
  }
}

/** Put a mark on a patch: a ring in its middle, others around it. */
function place(tile, mark, index) {
  const { image, marks } = tile;
  const row = Math.floor(index / image.columns);
  const column = index % image.columns;
  const middle = mark === "ring" ? 0.5 : 0;
  const style = marks[mark].style;
  style.left = `${((column + middle) / image.columns) * 100}%`;
  style.top = `${((row + middle) / image.rows) * 100}%`;
  if (mark !== "ring") {
    style.width = `${100 / image.columns}%`;
    style.height = `${100 / image.rows}%`;
  }
  marks[mark].hidden = false;
}
