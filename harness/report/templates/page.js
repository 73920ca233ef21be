for (const th of document.querySelectorAll("th")) {
  th.addEventListener("click", () => {
    const rows = [...th.closest("table").tBodies[0].rows], down = th.ariaSort === "ascending";
    const cell = (row) => row.cells[th.cellIndex].textContent.trim();
    const number = (text) => parseFloat(text.replaceAll(",", ""));
    rows.sort((a, b) => {
      const x = number(cell(a)), y = number(cell(b));
      return (Number.isNaN(x) && Number.isNaN(y) ? cell(a).localeCompare(cell(b)) : Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : x - y);
    });
    for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
    th.ariaSort = down ? "descending" : "ascending";
    th.closest("table").tBodies[0].append(...(down ? rows.reverse() : rows));
  });
}
for (const pre of document.querySelectorAll("pre")) {
  const button = document.createElement("button");
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(pre.querySelector("code").textContent);
    button.textContent = "Copied";
  });
  pre.append(button);
}
const measured = new ResizeObserver((entries) => {
  for (const { target } of entries) target.classList.toggle("more", target.scrollWidth > target.clientWidth + 1);
});
for (const box of document.querySelectorAll(".scroll")) measured.observe(box);
function reveal() {
  let at = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!at) return;
  for (let e = at; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  at.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();
