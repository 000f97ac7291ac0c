"use strict";
// Texts become nodes by textContent alone; the page's policy refuses every other way.

function make(name, text, attributes = {}) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// Sorting: a button in each head; what has no order goes last, whichever way.
function compare(one, other) {
  const [a, b] = [one, other].map((cell) => cell.dataset.order);
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
  const numbers = [a, b].map(Number);
  return numbers.some(Number.isNaN) ? a.localeCompare(b, "en", { numeric: true }) : numbers[0] - numbers[1];
}

function sort(table, column, button) {
  const heads = table.tHead.rows[0].cells;
  const up = heads[column].getAttribute("aria-sort") !== "ascending";
  const way = up ? 1 : -1;
  const rows = [...table.tBodies[0].rows].sort((one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    const open = a.dataset.order === undefined || b.dataset.order === undefined;
    return (open ? 1 : way) * compare(a, b);
  });
  table.tBodies[0].append(...rows);
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  button.focus();
}

function sortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", undefined, { type: "button" });
    button.append(head.firstChild);
    head.prepend(button);
    button.addEventListener("click", () => sort(table, column, button));
  });
}

// Signatures: of the number that is pointed at, tapped or reached by keys, at the foot of the page.
// A table is one stop of the Tab key; arrows go through its numbers.
const bar = document.getElementById("signature");

function show(cell) {
  bar.textContent = cell ? cell.dataset.signature : "";
  bar.hidden = !cell;
}

function beside(cell, key) {
  const row = cell.parentElement;
  const rows = [...cell.closest("table").rows];
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[key];
  const line = key === "ArrowLeft" || key === "ArrowRight"
    ? [...row.cells] : rows.map((other) => other.cells[cell.cellIndex]);
  let place = line.indexOf(cell) + step;
  while (line[place] && !line[place].dataset.signature) place += step;
  return line[place];
}

function signed(table) {
  const cells = [...table.querySelectorAll("[title]")];
  for (const cell of cells) {
    cell.dataset.signature = cell.title;
    cell.removeAttribute("title");
    cell.tabIndex = -1;
    cell.setAttribute("aria-describedby", "signature");
  }
  if (cells.length) cells[0].tabIndex = 0;
  const of = (event) => event.target.closest("[data-signature]");
  table.addEventListener("pointerover", (event) => show(of(event)));
  table.addEventListener("pointerleave", () => show(null));
  table.addEventListener("focusin", (event) => show(of(event)));
  table.addEventListener("focusout", () => show(null));
  table.addEventListener("keydown", (event) => {
    const cell = of(event);
    if (!cell || !event.key.startsWith("Arrow")) return;
    const next = beside(cell, event.key);
    event.preventDefault();
    if (!next) return;
    cell.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// A wide table can be scrolled by keys, too.
function reachable() {
  for (const box of document.querySelectorAll(".scroll")) {
    const wide = box.scrollWidth > box.clientWidth;
    for (const [key, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", `Table: ${box.querySelector("caption").textContent}`]]) {
      if (wide) box.setAttribute(key, value);
      else box.removeAttribute(key);
    }
  }
}

// The item browser.
function choice(label, names) {
  const box = make("label", label);
  const select = make("select");
  names.forEach((name, place) => select.append(make("option", name, { value: place })));
  box.append(select);
  return [box, select];
}

function side(suite, texts, row, said) {
  const box = make("div");
  const [value, outcome, text, found] = said;
  const came = !suite.fraction ? `${value} bits per byte` : value === 1 ? "right" : value === 0 ? "wrong" : `score ${value}`;
  box.append(make("h4", `${suite.rows[row]}: ${came}${outcome === "ok" ? "" : `, ${outcome}`}`));
  if (found >= 0) box.append(make("p", `Answer found: ${texts[found]}`));
  if (text >= 0) box.append(make("pre", texts[text]));
  return box;
}

function described(suite, item, pair) {
  const values = pair.map((row) => item.said[row][0]);
  const word = (value) => (suite.fraction ? (value === 1 ? "right" : value === 0 ? "wrong" : value) : value.toFixed(4));
  return `${item.task} ${item.id}: ${suite.rows[pair[0]]} ${word(values[0])}, ${suite.rows[pair[1]]} ${word(values[1])}`;
}

function entry(suite, texts, item, pair) {
  const box = make("details", undefined, { class: "item" });
  box.append(make("summary", described(suite, item, pair)));
  box.addEventListener("toggle", () => {
    if (box.childElementCount > 1) return;
    const prompt = item.asked[pair[0]];
    box.append(make("h3", "Prompt"), prompt >= 0 ? make("pre", texts[prompt]) : make("p", "not at hand"));
    if (item.gold >= 0) box.append(make("p", `Expected: ${texts[item.gold]}`));
    const sides = make("div", undefined, { class: "sides" });
    sides.append(...pair.map((row) => side(suite, texts, row, item.said[row])));
    box.append(sides);
  });
  return box;
}

function browser(place, { suites, texts }) {
  const bars = make("div", undefined, { class: "choice" });
  const told = make("p", "", { role: "status" });
  const list = make("div");
  const [suiteBox, suiteChoice] = choice("suite", suites.map((suite) => suite.title));
  const [oneBox, one] = choice("row", []);
  const [otherBox, other] = choice("and row", []);
  const [sortBox, which] = choice("which", ["all that differ", "first row better", "second row better"]);
  const better = (suite, a, b) => (suite.fraction ? a > b : a < b);

  function fill() {
    const suite = suites[suiteChoice.value];
    const pair = [Number(one.value), Number(other.value)];
    const differ = suite.differ[pair[0]][pair[1]];
    const found = suite.items.filter((item) => {
      const said = pair.map((row) => item.said[row]);
      if (!said[0] || !said[1] || said[0][0] === said[1][0] || differ < 0) return false;
      if (which.value === "1") return better(suite, said[0][0], said[1][0]);
      return which.value === "0" || better(suite, said[1][0], said[0][0]);
    });
    told.textContent = pair[0] === pair[1] ? "Choose two rows."
      : differ < 0 ? "Not comparable: these rows were not asked the same."
        : `${found.length} shown; ${differ} of the suite's items differ between these rows.`;
    list.replaceChildren(...found.map((item) => entry(suite, texts, item, pair)));
  }

  function rows() {
    const suite = suites[suiteChoice.value];
    const chosen = [one, other].map((select) => select.selectedOptions[0]?.textContent);
    for (const select of [one, other]) {
      select.replaceChildren(...suite.rows.map((name, number) => make("option", name, { value: number })));
    }
    const kept = chosen.map((name) => suite.rows.indexOf(name));
    const most = suite.differ.flatMap((line, a) => line.map((n, b) => [n, a, b])).sort((x, y) => y[0] - x[0])[0];
    [one.value, other.value] = kept[0] >= 0 && kept[1] >= 0 ? kept : [most[1], most[2]];
    fill();
  }

  suiteChoice.addEventListener("change", rows);
  for (const select of [one, other, which]) select.addEventListener("change", fill);
  bars.append(suiteBox, oneBox, otherBox, sortBox);
  place.append(bars, told, list);
  rows();
}

for (const table of document.querySelectorAll("table")) {
  sortable(table);
  signed(table);
}
const data = JSON.parse(document.getElementById("data").textContent);
for (const place of document.querySelectorAll("[data-browser]")) browser(place, data[place.dataset.browser]);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") show(null); });
document.addEventListener("toggle", reachable, true);
window.addEventListener("resize", reachable);
reachable();
// Print shows what is folded.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not(.item):not([open])")];
  for (const box of opened) box.open = true;
});
window.addEventListener("afterprint", () => { for (const box of opened) box.open = false; });
