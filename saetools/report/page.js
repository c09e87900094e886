"use strict";
// Figures: drawn in the page's font and colours, again whenever the reader's scheme changes.
const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, grid, line, raised, sans] = ["ink", "muted", "grid", "line", "raised", "sans"].map((name) => style.getPropertyValue(`--${name}`).trim());
  const axis = { gridcolor: grid, linecolor: muted, tickcolor: muted, zeroline: true, zerolinecolor: line, zerolinewidth: 1.5, tickfont: { color: muted }, title: { font: { size: 13 } }, showgrid: true };
  return {
    layout: {
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { family: sans, size: 13, color: ink },
      xaxis: axis, yaxis: axis,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
      hoverlabel: { bgcolor: raised, bordercolor: muted, font: { family: sans, color: ink }, align: "left" },
    },
    data: { scatter: [{ mode: "markers", hoverinfo: "text" }] },
  };
}
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
  layout.template = theme();
  if (layout.meta && plot.clientWidth > 700) layout.yaxis.ticktext = layout.meta.named;
  layout.dragmode = false; // a finger on a figure scrolls the page
  for (const axis of [layout.xaxis, layout.yaxis]) axis.fixedrange = true;
  Plotly.newPlot(plot, data, layout, { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] });
}
dark.addEventListener("change", () => plots.forEach((plot) => Plotly.relayout(plot, { template: theme() })));

// Tables: a click on a header sorts, a second one turns the order; cells without a value stay last.
function sortBy(header) {
  const body = header.closest("table").tBodies[0];
  const numeric = header.classList.contains("number");
  const up = header.ariaSort ? header.ariaSort === "descending" : !numeric;
  const value = (row) => {
    const cell = row.cells[header.cellIndex];
    return numeric ? parseFloat(cell.dataset.sort) : cell.textContent;
  };
  const rows = [...body.rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (!numeric) return (up ? 1 : -1) * a.localeCompare(b, undefined, { numeric: true });
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
    return up ? a - b : b - a;
  });
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows.map(([, row]) => row));
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}
