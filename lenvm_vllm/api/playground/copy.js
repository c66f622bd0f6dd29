// Buttons that copy the code which they name.

const SHOWN_MS = 1500;

export function bindCopies() {
  for (const button of document.querySelectorAll("[data-copies]")) {
    const said = button.innerHTML;
    button.addEventListener("click", async () => {
      const done = await copy(document.getElementById(button.dataset.copies));
      button.textContent = done ? "Copied" : "Selected";
      setTimeout(() => (button.innerHTML = said), SHOWN_MS);
    });
  }
}

// The clipboard is there for HTTPS and this machine only; elsewhere the old way may go.
async function copy(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(code);
    return document.execCommand("copy");
  }
}
