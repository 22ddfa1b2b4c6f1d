"use strict";
// The plots. Each is drawn when it comes into view, and again when its inputs change.
// The buttons are listed, because plotly.js has one of its own that uploads a plot to a server.
const CONFIG = {responsive: true, displaylogo: false, plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]};

// The script of plotly.js comes after this one.
const parsed = new Promise(resolve => addEventListener("DOMContentLoaded", resolve, {once: true}));

// A finger that scrolls the page must not be caught by a plot.
const TOUCH = matchMedia("(pointer: coarse)").matches;

function layout(more) {
  const axis = {gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true};
  const {xaxis, yaxis, ...rest} = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: colour("ink"), size: 12, family: "system-ui, sans-serif"},
    margin: {l: 54, r: 12, t: 30, b: 44}, hovermode: "closest", showlegend: true, dragmode: TOUCH ? false : "zoom",
    modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent")},
    legend: {orientation: "h", y: -0.18, yanchor: "top", x: 0}, xaxis: {...axis, ...xaxis}, yaxis: {...axis, ...yaxis}, ...rest,
  };
}

const axisOf = values => values.length && Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values) ? "log" : "linear";
const title = text => ({text: plain(text), standoff: 8});

// Draw, and show the card of the trial that is pointed at; `customdata` holds the index of each point's trial.
async function draw(id, traces, drawn, onPoint) {
  const box = byId(id);
  await parsed;
  await Plotly.react(box, traces, drawn, CONFIG);
  if (onPoint && !box.dataset.listening) {
    box.dataset.listening = "yes";
    const point = event => { const index = event.points[0]?.customdata; if (index !== undefined && index !== null) onPoint(index); };
    box.on("plotly_hover", point);
    box.on("plotly_click", point);
  }
  document.documentElement.dataset.drawn ??= String(Math.round(performance.now()));
}

function fillSelects() {
  const qualities = data.qualities.map(name => [name, `${name} (${data.goals[name] === "minimize" ? "lower" : "higher"} is better)`]);
  options(byId("front-quality"), qualities, data.metric);
  options(byId("front-cost"), Object.entries(data.costs), data.cost);
  if (byId("ticket-quality")) options(byId("ticket-quality"), qualities, data.metric);
  const curves = [...new Set(trials.flatMap(trial => Object.keys(trial.curves)))];
  options(byId("curve-figure"), curves.map(name => [name, name]), curves.includes(data.metric) ? data.metric : curves[0]);
  return {front: qualities.length && Object.keys(data.costs).length, curves: curves.length};
}

function drawFront() {
  const quality = byId("front-quality").value, cost = byId("front-cost").value, key = `${quality}|${cost}`;
  const known = trials.map((trial, i) => i).filter(i => Number.isFinite(trials[i].figures[quality]) && Number.isFinite(trials[i].figures[cost]));
  const x = i => trials[i].figures[cost], y = i => trials[i].figures[quality];
  const traces = [];
  if (byId("front-lineages").checked) traces.push(...lineages(key, known, x, y));
  const front = data.fronts[key] || [];
  traces.push({x: front.map(x), y: front.map(y), mode: "lines", name: "front", hoverinfo: "skip",
    line: {color: colour("ink"), width: 1.2, shape: "hv", dash: "dot"}});
  for (const status of new Set(known.map(i => trials[i].state))) {
    const own = known.filter(i => trials[i].state === status && state.passing.has(i));
    if (!own.length) continue;
    const bound = (i, end) => trials[i].intervals[quality] ? Math.abs(trials[i].intervals[quality][end] - y(i)) : 0;
    traces.push({x: own.map(x), y: own.map(y), customdata: own, mode: "markers", name: plain(status), hoverinfo: "text",
      hovertext: own.map(i => plain(`${short(trials[i].name)}: ${number(y(i))}`)),
      marker: {color: colourOf(trials[own[0]]), symbol: SYMBOLS[status] || "circle", size: own.length > 100 ? 7 : 10, line: {width: 1, color: colour("card")}},
      error_y: {type: "data", symmetric: false, array: own.map(i => bound(i, 1)), arrayminus: own.map(i => bound(i, 0)),
        visible: own.some(i => trials[i].intervals[quality]), color: colourOf(trials[own[0]]), thickness: 1, width: own.length > 100 ? 0 : 3}});
  }
  const faded = known.filter(i => !state.passing.has(i));
  if (faded.length) traces.push({x: faded.map(x), y: faded.map(y), customdata: faded, mode: "markers", name: "filtered out",
    hoverinfo: "none", marker: {color: colour("faded"), size: 6}});
  return draw("front-plot", traces, layout({xaxis: {title: title(data.costs[cost] || cost), type: axisOf(known.map(x))},
    yaxis: {title: title(quality)}}), index => showDetail(index));
}

// Lines from a parent to its children, and through the networks that one trial went through.
function lineages(key, known, x, y) {
  const line = {x: [], y: [], customdata: [], mode: "lines", name: "lineage", hoverinfo: "skip", line: {color: colour("other"), width: 1}};
  const before = {x: [], y: [], customdata: [], hovertext: [], mode: "markers", name: "before pruning or fine-tuning", hoverinfo: "text",
    marker: {color: colour("other"), symbol: "circle-open", size: 7}};
  const join = points => { for (const [px, py] of points) { line.x.push(px); line.y.push(py); } line.x.push(null); line.y.push(null); };
  const here = new Set(known.filter(i => state.passing.has(i)));
  for (const i of here) {
    const parent = byName.get(trials[i].parent);
    if (here.has(parent)) join([[x(parent), y(parent)], [x(i), y(i)]]);
    const stages = (data.stages[key] || {})[i] || [];
    if (stages.length) join([...stages.map(([, cost, value]) => [cost, value]), [x(i), y(i)]]);
    for (const [label, cost, value] of stages) {
      before.x.push(cost); before.y.push(value); before.customdata.push(i);
      before.hovertext.push(plain(`${short(trials[i].name)}, ${label}: ${number(value)}`));
    }
  }
  return [...(line.x.length ? [line] : []), ...(before.x.length ? [before] : [])];
}

function drawCurves() {
  const figure = byId("curve-figure").value, log = byId("curve-log").checked;
  const chosen = data.order.filter(i => state.chosen.has(i) && trials[i].curves[figure]);
  const LINES = lineColours();
  const traces = chosen.flatMap((i, place) => {
    const [steps, values] = trials[i].curves[figure];
    const own = LINES[place % LINES.length];
    const curve = {x: steps, y: values, customdata: steps.map(() => i), mode: steps.length > 1 ? "lines" : "markers", name: plain(short(trials[i].name)),
      legendgroup: String(i), line: {color: own, width: 2, dash: DASHES[Math.floor(place / LINES.length) % DASHES.length]}, marker: {color: own},
      hovertemplate: `%{y:.5g} at step %{x}<extra>${plain(short(trials[i].name)).replace(/[%{}]/g, "")}</extra>`};
    const end = {x: steps.slice(-1), y: values.slice(-1), customdata: [i], mode: "markers", showlegend: false, legendgroup: String(i),
      hoverinfo: "text", hovertext: plain(`${short(trials[i].name)}: ${trials[i].state}`), marker: {symbol: "x", size: 11, color: own}};
    return ENDED_EARLY.has(trials[i].state) ? [curve, end] : [curve];
  });
  return draw("curve-plot", traces, layout({xaxis: {title: title("step"), rangemode: "tozero"}, yaxis: {title: title(figure), type: log ? "log" : "linear"}}),
    index => showDetail(index));
}

function drawTickets() {
  const figure = byId("ticket-quality").value, kinds = new Map();
  trials.forEach((trial, i) => {
    if (!Number.isFinite(trial.figures[figure]) || !Number.isFinite(trial.figures.remaining)) return;
    const control = trial.settings["prune.control"] || data.common["prune.control"] || "none";
    kinds.set(control, [...(kinds.get(control) || []), i]);
  });
  const LINES = lineColours();
  const names = {none: "tickets", reinit: "random reinitialisation", random_mask: "random mask"};
  const traces = [...kinds].map(([control, own], place) => {
    own.sort((a, b) => trials[b].figures.remaining - trials[a].figures.remaining);
    const bound = (i, end) => trials[i].intervals[figure] ? Math.abs(trials[i].intervals[figure][end] - trials[i].figures[figure]) : 0;
    return {x: own.map(i => 100 * trials[i].figures.remaining), y: own.map(i => trials[i].figures[figure]), customdata: own, mode: "lines+markers",
      name: plain(names[control] || control), line: {color: LINES[place % LINES.length]}, marker: {size: 8, symbol: ["circle", "square", "diamond"][place % 3]},
      hovertemplate: "%{y:.5g} with %{x:.3g}% of the weights<extra></extra>",
      error_y: {type: "data", symmetric: false, array: own.map(i => bound(i, 1)), arrayminus: own.map(i => bound(i, 0)),
        visible: own.some(i => trials[i].intervals[figure]), thickness: 1}};
  });
  return draw("ticket-plot", traces, layout({xaxis: {title: title("remaining weights (%)"), type: "log", autorange: "reversed", dtick: Math.log10(2)},
    yaxis: {title: title(figure)}}), index => showDetail(index));
}

// Parallel coordinates: one line a trial, in six groups by rank, so that 500 trials are seven traces.
function drawParallel() {
  const shades = ["#b8c40f", "#6fbf54", "#2fa37c", "#2c8390", "#3d6391", "#59408c"];
  const measured = data.order.filter(i => Number.isFinite(trials[i].figures[data.metric]));
  const axes = [...data.varied.slice(0, 8).map(key => [key, i => trials[i].settings[key] ?? "-"]), [data.metric, i => trials[i].figures[data.metric]]]
    .map(([key, value]) => scale(key, value, measured));
  byId("parallel-plot").style.minWidth = `${Math.max(0, 105 * axes.length)}px`;
  const groups = [colour("faded"), ...shades.slice().reverse()].map(shade => ({x: [], y: [], customdata: [], mode: "lines", hoverinfo: "none",
    showlegend: false, line: {color: shade, width: measured.length > 60 ? 1 : 2}}));
  measured.forEach((i, place) => {
    const rank = shades.length - Math.floor(place / measured.length * shades.length);
    const group = groups[state.passing.has(i) ? rank : 0];
    axes.forEach((axis, at) => { group.x.push(at); group.y.push(axis.place(i)); group.customdata.push(i); });
    group.x.push(null); group.y.push(null); group.customdata.push(null);
  });
  const annotations = axes.flatMap((axis, at) => axis.ticks.map(([y, text]) => ({x: at, y, text: plain(short(text, 14)), showarrow: false,
    xanchor: at === axes.length - 1 ? "right" : "left", xshift: at === axes.length - 1 ? -4 : 4, bgcolor: colour("card"), opacity: 0.85, font: {size: 11}})));
  const shapes = axes.map((axis, at) => ({type: "line", x0: at, x1: at, y0: 0, y1: 1, layer: "below", line: {color: colour("line"), width: 1}}));
  return draw("parallel-plot", groups, layout({annotations, shapes, showlegend: false, dragmode: false, margin: {l: 50, r: 70, t: 30, b: 60},
    xaxis: {tickvals: axes.map((axis, at) => at), ticktext: axes.map(axis => plain(short(axis.key, 22))), range: [-0.1, axes.length - 0.9], fixedrange: true, ticklabeloverflow: "allow", tickangle: axes.length > 5 ? 20 : 0},
    yaxis: {visible: false, range: [-0.06, 1.06], fixedrange: true}}), index => showDetail(index));
}

function scale(key, value, indices) {
  const numeric = key === data.metric || data.numeric.includes(key);
  const raw = i => numeric ? Number(value(i)) : String(value(i));
  if (numeric) {
    const all = indices.map(raw), low = Math.min(...all), high = Math.max(...all);
    const log = low > 0 && high > 20 * low, f = log ? Math.log : v => v;
    return {key: log ? `${key} (log)` : key, place: i => high === low ? 0.5 : (f(raw(i)) - f(low)) / (f(high) - f(low)),
      ticks: high === low ? [[0.5, number(low)]] : [[0, number(low)], [1, number(high)]]};
  }
  const kinds = [...new Set(indices.map(raw))].sort(), at = new Map(kinds.map((kind, place) => [kind, kinds.length < 2 ? 0.5 : place / (kinds.length - 1)]));
  return {key, place: i => at.get(raw(i)), ticks: kinds.length > 12 ? [] : kinds.map(kind => [at.get(kind), kind])};
}

const rounded = (key, text) => data.numeric.includes(key) ? number(Number(text)) : text;

function drawGallery() {
  const chosen = data.order.filter(i => state.chosen.has(i) && data.pictures[i]);
  byId("gallery").replaceChildren(...chosen.map(i => {
    const figure = element("figure", {}, element("h3", {textContent: trials[i].name}));
    const image = picture(i);
    figure.append(image);
    const caption = data.varied.filter(key => key in trials[i].settings).slice(0, 4).map(key => `${key.split(".").pop()}=${rounded(key, trials[i].settings[key])}`);
    const value = data.metric && Number.isFinite(trials[i].figures[data.metric]) ? [`${data.metric} ${figureText(trials[i], data.metric)}`] : [];
    figure.append(element("figcaption", {textContent: [...value, ...caption].join(", ")}));
    if (data.animations[i]) {
      const button = element("button", {type: "button", textContent: "From noise to image"});
      button.addEventListener("click", () => {
        const still = image.src === data.pictures[i];
        image.src = still ? data.animations[i] : data.pictures[i];
        button.textContent = still ? "Samples" : "From noise to image";
      });
      figure.append(button);
    }
    return figure;
  }));
  const some = Object.keys(data.pictures).length;
  byId("gallery-note").textContent = some === 0 ? "No images were recorded." : `Ticked trials. The page holds the images of ${some} of ${trials.length} trials, the best first.`;
}
