"use strict";
// Wire everything up. Plots draw when they come into view, so that a large study opens at once.
const inView = new Map();
const observer = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    observer.unobserve(entry.target);
    const job = inView.get(entry.target);
    job.visible = true;
    job.draw();
  }
}, {rootMargin: "300px"});

function section(id, draw, possible = true) {
  const box = byId(id);
  if (!box) return () => {};
  box.hidden = !possible;
  if (!possible) return () => {};
  const job = {visible: false, draw};
  inView.set(box, job);
  observer.observe(box);
  return () => { if (job.visible) job.draw(); };
}

const has = fillSelects();
const redraw = {};
startTable(what => (what === "filter" ? [redraw.front, redraw.parallel] : [redraw.curves, redraw.gallery]).forEach(again => again()));
redraw.front = section("front", drawFront, has.front > 0);
redraw.tickets = section("tickets", drawTickets, has.front > 0);
redraw.curves = section("curves", drawCurves, has.curves > 0);
redraw.parallel = section("parallel", drawParallel, data.varied.length > 0 && trials.filter(trial => Number.isFinite(trial.figures[data.metric])).length > 1);
redraw.gallery = section("pictures", drawGallery);
for (const id of ["front-quality", "front-cost", "front-lineages"]) byId(id).addEventListener("change", redraw.front);
for (const id of ["curve-figure", "curve-log"]) byId(id).addEventListener("change", redraw.curves);
byId("ticket-quality")?.addEventListener("change", redraw.tickets);
for (const button of document.querySelectorAll("[data-copy]")) copyButton(button, () => button.previousElementSibling.textContent);
for (const button of document.querySelectorAll("[data-trial]")) {
  button.addEventListener("click", () => { const index = byName.get(button.dataset.trial); if (index !== undefined) showDetail(index, true); });
}
DARK.addEventListener("change", () => Object.values(redraw).forEach(again => again()));
if (data.order.length) showDetail(data.order[0]);
document.documentElement.dataset.took = String(Math.round(performance.now() - begun));
