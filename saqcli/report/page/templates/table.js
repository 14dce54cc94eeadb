for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[0], rows = [...body.rows], most = 14;
  for (const head of table.querySelectorAll("th[data-column]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending", at = +head.dataset.column;
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => parseFloat(row.cells[at].dataset.value ?? "NaN");
      const sorted = [...rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return isNaN(x) - isNaN(y) || (down ? y - x : x - y) || rows.indexOf(a) - rows.indexOf(b);
      });
      body.append(...sorted);
      fold();
    });
  }
  const fold = () => [...body.rows].forEach((row, index) => row.classList.toggle("more", index >= most));
  fold();
  if (rows.length > most + 2) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "unfold";
    const show = (folded) => {
      table.classList.toggle("folded", folded);
      button.textContent = folded ? `Show all ${rows.length} layers` : "Show fewer";
      button.setAttribute("aria-expanded", String(!folded));
    };
    button.addEventListener("click", () => show(!table.classList.contains("folded")));
    table.parentElement.after(button);
    show(true);
  }
}
