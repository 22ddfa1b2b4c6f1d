"use strict";
// Data, state and small functions that the other scripts share. Texts become text nodes, never markup.
const begun = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);
const trials = data.trials;
const byName = new Map(trials.map((trial, index) => [trial.name, index]));
const rows = [...document.querySelectorAll("#table tbody tr")];
const rowOf = new Map(rows.map(row => [Number(row.dataset.i), row]));
const ENDED_EARLY = new Set(["stopped", "failed", "killed", "crashed"]);
const SYMBOLS = {finished: "circle", stopped: "square", running: "diamond", failed: "x", killed: "square", crashed: "x"};
// Okabe and Ito; the dark ones are lighter on a dark page.
const DARK = matchMedia("(prefers-color-scheme: dark)");
const lineColours = () => DARK.matches ? ["#4ba3e3", "#e69f00", "#2bc79a", "#cc79a7", "#8fd3ff", "#ff8a4c", "#d9d94a", "#b5b5b5"]
  : ["#0072b2", "#c98a00", "#009e73", "#b85c91", "#3a9fdc", "#d55e00", "#7d7d1f", "#7a7a7a"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const state = {passing: new Set(trials.keys()), chosen: new Set(), shown: null};

const byId = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const colourOf = trial => colour({killed: "stopped", crashed: "failed"}[trial.state] || trial.state) || colour("other");
// Plotly reads a little markup in its texts.
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text, most = 34) => text.length > most ? `${text.slice(0, most - 1)}…` : text;
const number = value => value === null || value === undefined ? "-"
  : Math.abs(value) >= 1e5 ? value.toLocaleString("en", {maximumFractionDigits: 0}) : String(Number(value.toPrecision(5)));

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// A browser may refuse storage to a file; then the choices last as long as the page.
function remember(key, value) {
  try { sessionStorage.setItem(`${location.pathname}:${key}`, JSON.stringify(value)); } catch { /* refused */ }
}
function recall(key) {
  try { return JSON.parse(sessionStorage.getItem(`${location.pathname}:${key}`)); } catch { return null; }
}

function options(select, entries, initial) {
  select.replaceChildren(...entries.map(([value, label]) => element("option", {value, textContent: label})));
  const kept = recall(select.id);
  select.value = entries.some(([value]) => value === kept) ? kept : initial;
  select.addEventListener("change", () => remember(select.id, select.value));
}

function copyButton(button, text) {
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text()); } catch {
      const area = element("textarea", {value: text()});
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1200);
  });
}

function definitions(pairs) {
  const list = element("dl");
  for (const [key, value] of pairs) list.append(element("dt", {textContent: key}), element("dd", {textContent: value}));
  return list;
}

function figureText(trial, name) {
  const interval = trial.intervals[name];
  return number(trial.figures[name]) + (interval ? ` (${number(interval[0])} to ${number(interval[1])})` : "");
}

function picture(index, animated = false) {
  const uri = (animated ? data.animations : data.pictures)[index];
  return uri ? element("img", {src: uri, alt: `samples of ${trials[index].name}`, loading: "lazy"}) : null;
}

// The card of a trial: figures with their intervals, settings, images, commands.
function showDetail(index, scroll = false) {
  if (state.shown === index && !scroll) return;
  state.shown = index;
  const trial = trials[index], box = byId("detail");
  const step = trial.step === null ? "" : `, step ${trial.step.toLocaleString("en")}`;
  box.replaceChildren(element("h3", {textContent: trial.name}), element("p", {className: "note", textContent: trial.state + step}));
  const image = picture(index);
  if (image) box.append(image);
  const figures = [...data.qualities, ...Object.keys(data.costs)].filter(name => name in trial.figures);
  box.append(definitions(figures.map(name => [data.costs[name] || name, figureText(trial, name)])));
  const varied = data.varied.filter(key => key in trial.settings);
  if (varied.length) box.append(definitions(varied.map(key => [key, trial.settings[key]])));
  if (trial.parent) box.append(element("p", {textContent: `made from ${trial.parent}`}));
  for (const [label, address] of Object.entries(trial.links)) {
    if (/^https?:/.test(address)) box.append(element("a", {href: address, textContent: label, rel: "noreferrer"}), " ");
  }
  for (const [label, text] of [["Train it again", trial.reproduce], ["Sample from it", trial.sample]]) {
    if (!text) continue;
    const button = element("button", {type: "button", textContent: `Copy: ${label.toLowerCase()}`});
    copyButton(button, () => text);
    box.append(button, " ");
  }
  const all = {...data.common, ...trial.settings};
  box.append(element("details", {}, element("summary", {textContent: "All settings"}), definitions(Object.entries(all).sort())));
  if (scroll) box.scrollIntoView({block: "nearest", behavior: "smooth"});
}
