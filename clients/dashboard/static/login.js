// Says that a token was refused, where the server sent the browser back.
document.getElementById("refused").hidden = !new URLSearchParams(location.search).has("refused");
