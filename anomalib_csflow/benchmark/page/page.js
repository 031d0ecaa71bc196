"use strict";
{
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const table = document.getElementById("summary");

  // the table: sorting, filtering, groups of columns
  if (table) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, values: JSON.parse(row.dataset.values), text: row.textContent.toLowerCase() }));
    const collator = new Intl.Collator("en", { numeric: true });

    const sort = (head) => {
      const key = head.dataset.key;
      const isText = key === "detector" || key === "data";
      const first = "higher" in head.dataset || key === "seeds" ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const direction = head.getAttribute("aria-sort") === first ? second : first;
      all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [one, other] = [a.values[key], b.values[key]];
        if (one === undefined || other === undefined) return (one === undefined) - (other === undefined); // what was not measured stands last
        return sign * (isText ? collator.compare(one, other) : one - other);
      });
      body.append(...rows.map(({ row }) => row));
    };
    all("thead th[data-key]", table).forEach((head) => head.querySelector("button").addEventListener("click", () => sort(head)));

    const [byData, byDetector, byText] = ["by-data", "by-detector", "by-text"].map((id) => document.getElementById(id));
    const filter = () => {
      const words = byText.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { row, values, text } of rows) {
        const fits = (!byData.value || values.data === byData.value) && (!byDetector.value || values.detector === byDetector.value) && words.every((word) => text.includes(word));
        row.hidden = !fits;
        shown += fits;
      }
      document.getElementById("count").textContent = `${shown} of ${rows.length} rows`;
    };
    const columns = () => {
      for (const box of all("input[data-group]")) {
        all(`[data-group="${CSS.escape(box.dataset.group)}"]`, table).forEach((cell) => { cell.hidden = !box.checked; });
      }
      const shown = all("thead tr:last-child th", table).filter((head) => !head.hidden).length;
      all(".reason", table).forEach((cell) => { cell.colSpan = shown + 1; });
    };
    const form = document.getElementById("filters");
    for (const event of ["input", "change"]) form.addEventListener(event, () => { filter(); columns(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    filter(); // a reload keeps what was typed
    columns();
  }

  // charts of the chosen metric
  for (const select of all("select[data-shows]")) {
    const show = () => all(`[data-panel="${select.dataset.shows}"]`).forEach((panel) => { panel.hidden = panel.dataset.value !== select.value; });
    select.addEventListener("change", show);
    show();
  }

  // curves that are picked out
  for (const section of all("section.curves")) {
    const buttons = all(".legend button", section);
    const pick = () => {
      const picked = buttons.filter((button) => button.getAttribute("aria-pressed") === "true").map((button) => button.dataset.detector);
      all(".curve", section).forEach((curve) => curve.classList.toggle("dim", picked.length > 0 && !picked.includes(curve.dataset.detector)));
    };
    buttons.forEach((button) => button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      pick();
    }));
  }
}
