"use strict";
// The table of trials: sort, filter, hide columns, export, choose.
const heads = [...document.querySelectorAll("#table thead th")];
const keys = heads.map(head => head.textContent.trim());
const cellsOf = new Map(rows.map(row => [row, [...row.cells]]));

function cellValue(row, column) {
  const cell = cellsOf.get(row)[column];
  return cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v);
}

function sortBy(column, descending) {
  const value = row => cellValue(row, column);
  const missing = v => v === "-" || v === "" || Number.isNaN(v);
  const sign = descending ? -1 : 1;
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    if (typeof x === "number" && typeof y === "number") return sign * (x - y);
    return sign * String(x).localeCompare(String(y), "en", {numeric: true});
  });
  document.querySelector("#table tbody").append(...rows);
  heads.forEach((head, i) => {
    if (head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending");
  });
  remember("sort", [column, descending]);
}

// A word is text that the row contains, or KEY<VALUE, KEY>VALUE, KEY=VALUE, KEY!=VALUE with the end of a column's name.
function test(word) {
  const found = /^(.+?)(!=|<=|>=|=|<|>)(.+)$/.exec(word);
  const column = found ? keys.findIndex(key => key === found[1] || key.endsWith(`.${found[1]}`) || key.endsWith(`/${found[1]}`)) : -1;
  if (column < 0) {
    const text = word.toLowerCase();
    return row => cellsOf.get(row).some(cell => cell.textContent.toLowerCase().includes(text));
  }
  const [, , sign, right] = found;
  return row => {
    const left = cellValue(row, column), wanted = Number(right);
    const equal = typeof left === "number" && !Number.isNaN(wanted) ? left === wanted || number(left) === number(wanted) : String(left) === right;
    if (sign === "=") return equal;
    if (sign === "!=") return !equal;
    if (typeof left !== "number" || Number.isNaN(wanted)) return false;
    return sign === "<" ? left < wanted : sign === ">" ? left > wanted : sign === "<=" ? left <= wanted : left >= wanted;
  };
}

function applyFilter() {
  const text = byId("filter").value.trim(), tests = text ? text.split(/\s+/).map(test) : [];
  state.passing = new Set();
  for (const row of rows) {
    row.hidden = !tests.every(passes => passes(row));
    if (!row.hidden) state.passing.add(Number(row.dataset.i));
  }
  byId("count").textContent = `${state.passing.size} of ${rows.length} trials.`;
  remember("filter", text);
}

function setColumn(index, shown) {
  const place = heads.findIndex(head => head.dataset.c === String(index));
  heads[place].hidden = !shown;
  for (const row of rows) cellsOf.get(row)[place].hidden = !shown;
}

function csv() {
  const quote = text => /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  // A text that a spreadsheet would take for a formula gets an apostrophe before it.
  const text = cell => cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent.trim().replace(/^(?=[=+@\t]|-.)/, "'");
  const shown = heads.map((head, i) => i).filter(i => i > 0 && !heads[i].hidden);
  const lines = [shown.map(i => quote(keys[i])).join(",")];
  for (const row of rows) if (!row.hidden) lines.push(shown.map(i => quote(text(cellsOf.get(row)[i]))).join(","));
  return lines.join("\r\n") + "\r\n";
}

function choose(index, chosen) {
  chosen ? state.chosen.add(index) : state.chosen.delete(index);
  const row = rowOf.get(index);
  row.classList.toggle("chosen", chosen);
  row.querySelector("input").checked = chosen;
}

function startTable(changed) {
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () =>
    sortBy(column, head.getAttribute("aria-sort") === "ascending")));
  let waiting = 0;
  byId("filter").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { applyFilter(); changed("filter"); }, 120);
  });
  for (const box of document.querySelectorAll("#columns input")) {
    box.addEventListener("change", () => setColumn(Number(box.dataset.column), box.checked));
  }
  byId("csv").addEventListener("click", () => {
    const link = element("a", {href: `data:text/csv;charset=utf-8,${encodeURIComponent(csv())}`, download: "trials.csv"});
    link.click();
  });
  for (const row of rows) row.querySelector("input").addEventListener("change", event => {
    choose(Number(row.dataset.i), event.target.checked);
    remember("chosen", [...state.chosen].map(index => trials[index].name));
    changed("chosen");
  });
  const kept = recall("chosen");
  const early = data.order.filter(index => ENDED_EARLY.has(trials[index].state)).slice(0, 3);
  const first = kept ? kept.map(name => byName.get(name)).filter(index => index !== undefined) : [...data.order.slice(0, 6), ...early];
  first.forEach(index => choose(index, true));
  byId("filter").value = recall("filter") || "";
  applyFilter();
  const sort = recall("sort");
  if (sort) sortBy(...sort);
}
