// Shows the values of a chart under the pointer.
const createElement = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const format = (value) => value.toLocaleString("en", { maximumSignificantDigits: Math.abs(value) < 1000 ? 4 : 7 });

for (const plot of document.querySelectorAll(".plot")) {
  const { unit, x: xUnit, ends: [left, right], plot: [from, to], lines } = JSON.parse(
    plot.parentElement.querySelector("script").textContent,
  );
  const tip = createElement("div", { className: "tip", hidden: true });
  const cursor = createElement("div", { className: "cursor", hidden: true });
  plot.append(cursor, tip);

  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width - from) / (to - from);
    const x = left + Math.min(1, Math.max(0, share)) * (right - left);
    const nearest = lines
      .map((line) => ({ ...line, at: line.x.reduce((best, each, k) => (Math.abs(each - x) < Math.abs(line.x[best] - x) ? k : best), 0) }))
      .filter((line) => Math.abs(line.x[line.at] - x) <= (right - left) / 20 || x < line.x.at(-1)); // leave out a run that ends before x
    if (!nearest.length) return;
    const first = nearest.reduce((a, b) => (Math.abs(b.x[b.at] - x) < Math.abs(a.x[a.at] - x) ? b : a));
    const at = first.x[first.at];
    tip.replaceChildren(
      createElement("div", {}, `${xUnit} ${format(xUnit === "step" ? Math.round(at) : at)}`),
      ...nearest.map((line) =>
        createElement("div", {}, createElement("i", { className: "key", style: `background: var(${line.color})` }), `${line.name} `,
          createElement("b", {}, format(line.y[line.at]) + (unit && ` ${unit}`)))),
    );
    tip.hidden = cursor.hidden = false;
    const place = (from + ((to - from) * (at - left)) / (right - left || 1)) * box.width;
    cursor.style.left = `${place}px`;
    const room = box.width - tip.offsetWidth;
    tip.style.left = `${place + 12 < room ? place + 12 : Math.max(0, place - tip.offsetWidth - 12)}px`;
  };
  const hide = () => (tip.hidden = cursor.hidden = true);
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  addEventListener("pointerdown", (event) => plot.contains(event.target) || hide()); // a tap outside the plot
}
