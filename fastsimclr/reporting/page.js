// The values under the pointer or the finger; before printing, all that is folded is opened.
for (const figure of document.querySelectorAll("figure[data-left]")) {
  const lines = JSON.parse(figure.querySelector("script").textContent);
  const names = [...figure.querySelectorAll("[data-name]")];
  const plot = figure.querySelector(".plot");
  const axes = plot.querySelector(".axes");
  const cursor = plot.querySelector(".cursor");
  const { left, right, unit, x: xUnit } = figure.dataset;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  plot.append(tip);
  const shown = (value) => value.toLocaleString("en", { maximumSignificantDigits: Math.abs(value) < 1000 ? 4 : 7 });

  const show = (event) => {
    const box = axes.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = +left + share * (right - left);
    let nearest = null;
    const rows = lines.flatMap(([xs, ys], place) => {
      let low = 0;
      let high = xs.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (xs[middle] < x) low = middle; else high = middle;
      }
      const at = x - xs[low] < xs[high] - x ? low : high;
      if (Math.abs(xs[at] - x) > (right - left) / 20 && (x < xs[0] || x > xs.at(-1))) return []; // a shorter run
      if (nearest === null || Math.abs(xs[at] - x) < Math.abs(nearest - x)) nearest = xs[at];
      const row = document.createElement("div");
      const key = document.createElement("i");
      key.className = names[place].getAttribute("class").replace("line", "key");
      const value = document.createElement("b");
      value.textContent = shown(ys[at]) + (unit === "%" ? " %" : "");
      row.append(key, names[place].dataset.name.replaceAll("_", " ") + " ", value);
      return [row];
    });
    const head = document.createElement("div");
    head.textContent = `${xUnit} ${shown(xUnit === "step" ? Math.round(nearest) : nearest)}`;
    tip.replaceChildren(head, ...rows);
    const place = (100 * (nearest - left)) / (right - left || 1);
    cursor.setAttribute("x1", `${place}%`);
    cursor.setAttribute("x2", `${place}%`);
    cursor.setAttribute("visibility", "visible");
    tip.hidden = false;
    const room = box.width - tip.offsetWidth;
    const from = (place / 100) * box.width;
    tip.style.transform = `translateX(${from + 12 < room ? from + 12 : Math.max(0, from - tip.offsetWidth - 12)}px)`;
  };
  const hide = () => {
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  addEventListener("pointerdown", (event) => plot.contains(event.target) || hide()); // a tap beside it
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
