// Copy buttons, Escape for Stop, and the caret back in the box after a click that sends.
function llmquantCopy(button) {
  const text = button.parentElement.querySelector(".message").textContent;
  const copied = () => {
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  // Over plain HTTP browsers have no clipboard for pages that are not on this machine.
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(copied);
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  if (document.execCommand("copy")) copied();
  area.remove();
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.matches("#chat .copy")) llmquantCopy(button);
  // Not on a phone, where it would open the keyboard over the answer.
  else if (button.matches("#send, #stop, #regenerate, #clear") && matchMedia("(hover: hover)").matches)
    document.querySelector("#box textarea").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const stop = [...document.querySelectorAll("#stop, #ab-stop")].find((b) => b.offsetParent);
  if (stop) stop.click();
});
