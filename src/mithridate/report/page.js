"use strict";
// Tables sort by the column whose heading is pressed: by its number where most cells have one, else by its text.
// Rows under a section heading stay under it.
for (const table of document.querySelectorAll("table")) {
  for (const heading of table.querySelectorAll("thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const column = heading.cellIndex;
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("section"));
        const texts = new Map(rows.map((row) => [row, row.cells[column].textContent.trim()]));
        const number = (row) => parseFloat(texts.get(row).replace(/^[^-+.\d]*/, ""));
        const known = rows.filter((row) => !Number.isNaN(number(row)));
        const numeric = 2 * known.length >= rows.length && known.length > 0;
        rows.sort((a, b) => {
          if (!numeric) return texts.get(a).localeCompare(texts.get(b)) * (down ? -1 : 1);
          const [x, y] = [number(a), number(b)];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
          return (x - y) * (down ? -1 : 1);
        });
        for (const row of rows) { row.classList.remove("first"); body.append(row); }
      }
    });
  }
}
