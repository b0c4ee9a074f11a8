// The theme that was chosen, before anything is drawn: auto follows the system.
(() => {
  const chosen = localStorage.getItem("hrpro-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
