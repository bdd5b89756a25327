"use strict";
// Sorts and filters the table of all blocks, and leads from a curve to its row. The page says all it has to say
// without this. Nothing here makes HTML out of text.
(() => {
  const table = document.getElementById("table");
  if (!table) return;
  const bodies = [...table.tBodies];
  const heads = [...table.tHead.rows[0].cells];
  const filter = document.getElementById("filter");
  const status = document.getElementById("status");
  const shown = document.getElementById("shown");
  const texts = new Map();

  function text(body) {
    if (!texts.has(body)) texts.set(body, body.rows[0].textContent.toLowerCase());
    return texts.get(body);
  }

  function show() {
    const wanted = filter.value.trim().toLowerCase();
    let count = 0;
    for (const body of bodies) {
      const fits = (!status.value || body.dataset.s === status.value) && (!wanted || text(body).includes(wanted));
      body.hidden = !fits;
      count += fits;
    }
    shown.textContent = count + " of " + bodies.length + " shown";
  }

  // Numbers by value, what is missing last in either direction; everything else as text, with 2 before 10.
  const collator = new Intl.Collator("en", { numeric: true });
  function sort(column, numeric, sign) {
    const key = (body) => {
      const cell = body.rows[0].cells[column];
      if (!numeric) return cell.textContent;
      const text = cell.dataset.v ?? cell.textContent;
      return text.trim() === "" || isNaN(text) ? null : Number(text);
    };
    const keyed = bodies.map((body) => [key(body), body]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (numeric ? a - b : collator.compare(a, b));
    });
    table.append(...keyed.map(([, body]) => body));
  }

  heads.forEach((head, column) => {
    const numeric = head.classList.contains("num");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const old = head.getAttribute("aria-sort");
      const up = old ? old === "descending" : !numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      sort(column, numeric, up ? 1 : -1);
    });
  });
  const time = heads.findIndex((head) => head.textContent === "time");
  if (time >= 0) heads[time].setAttribute("aria-sort", "descending");

  // A block that a link leads to is shown and opened, whatever the filter says.
  function follow() {
    const body = /^#b\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (!body) return;
    body.hidden = false;
    body.querySelector("details").open = true;
    body.scrollIntoView({ block: "center" });
  }

  // The curves of a row that is pointed at or opened stand out.
  const curves = new Map();
  for (const link of document.querySelectorAll(".plot a[href]")) {
    const row = link.getAttribute("href").slice(1);
    curves.set(row, [...(curves.get(row) ?? []), link.firstElementChild]);
  }
  for (const body of bodies) {
    const own = curves.get(body.id) ?? [];
    const light = (on) => own.forEach((path) => path.classList.toggle("lit", on));
    const details = body.querySelector("details");
    body.addEventListener("mouseenter", () => light(true));
    body.addEventListener("mouseleave", () => light(details.open));
    details.addEventListener("toggle", () => light(details.open));
  }

  filter.addEventListener("input", show);
  status.addEventListener("change", show);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("controls").hidden = false;
  addEventListener("hashchange", follow);
  show();
  follow();
})();
