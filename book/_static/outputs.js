// The outputs of a page's cells, once it is there.
const FEW = 4;

// Recorded values are there to be checked, and the prose quotes them: more than a few in a row are folded away.
function fold(output) {
  const values = [...output.children].filter((child) => child.querySelector(":scope > .recorded"));
  if (values.length <= FEW) return;
  const box = document.createElement("details");
  const summary = document.createElement("summary");
  box.className = "recorded-values";
  summary.textContent = `${values.length} recorded values`;
  values[0].before(box);
  box.append(summary, ...values);
}

window.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".cell_output").forEach(fold);
  // pandas gives a styled table no class; the reader should not see which kind of table it was
  document.querySelectorAll(".cell_output table[id^=T_]").forEach((table) => table.classList.add("dataframe", "table"));
});
