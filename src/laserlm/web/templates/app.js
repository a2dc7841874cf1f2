// Buttons within an HTML element say which one was pressed; arrow keys move among those of a table.
const buttons = () => [...element.querySelectorAll("button[data-pick]")];
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-pick]");
  if (!button) return;
  buttons().forEach(other => other.setAttribute("aria-pressed", other === button));
  trigger("click", {pick: button.dataset.pick});
});
const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
element.addEventListener("keydown", event => {
  const cell = event.target.closest("td");
  const step = steps[event.key];
  if (!cell || !step) return;
  event.preventDefault();
  const rows = [...cell.closest("tbody").rows];
  let row = rows.indexOf(cell.parentElement), column = cell.cellIndex;
  while (rows[row += step[0]]?.cells[column += step[1]]) {
    const next = rows[row].cells[column].querySelector("button");
    if (!next) continue;
    buttons().forEach(other => { other.tabIndex = -1; });
    next.tabIndex = 0;
    next.focus();
    return;
  }
});
