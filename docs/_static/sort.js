// The headings of long tables sort them, by mouse and keyboard; another click turns the order round.
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table").forEach(table => {
  const headings = [...table.querySelectorAll("thead th")], body = table.tBodies[0];
  if (!headings.length || !body || body.rows.length < 10 || table.querySelector("[rowspan], [colspan]")) return;
  const order = (one, two) => parseFloat(one) - parseFloat(two) || one.localeCompare(two, "en");
  headings.forEach((heading, column) => {
    if (!heading.textContent.trim()) return;
    const button = document.createElement("button"), text = row => row.cells[column].textContent.trim();
    const place = heading.querySelector("p") ?? heading;
    button.append(...place.childNodes);
    place.append(button);
    button.onclick = () => {
      const sign = heading.ariaSort === "ascending" ? -1 : 1;
      headings.forEach(each => each.ariaSort = each !== heading ? null : sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((one, two) => sign * order(text(one), text(two))));
    };
  });
}));
