// What runs in the browser: language, chats that are kept, a box drawn over a photo, downloads.
// `page/build.py` puts it before everything else in the page, because Gradio reads the browser's language first.

const vqa = {
  language: (document.cookie.match(/vqa_language=(en|zh)/) || [, navigator.language.startsWith("zh") ? "zh" : "en"])[1],

  choose_language(language) {
    document.cookie = `vqa_language=${language}; path=/; max-age=31536000; SameSite=Lax`
  },

  switch_language() {
    vqa.choose_language(vqa.language === "zh" ? "en" : "zh")
    location.reload()
  },

  // Gradio writes some labels in English only, and gives some elements none
  chinese: {
    __proto__: null,  // so that it has no "constructor" or "toString"
    "Copy message": "复制", "Copy conversation": "复制对话", "Copied conversation": "已复制", "Fullscreen": "全屏",
    "chatbot conversation": "对话", "Exit fullscreen mode": "退出全屏", "Remove file": "移除文件",
    "Click to Access Webcam": "点击启用摄像头", "Upload a file": "上传文件", "Clear": "清除",
    "grant webcam access": "允许使用摄像头", "capture photo": "拍照", "select input source": "选择摄像头", "Multimedia input field": "问题和照片", "Close": "关闭",
    "Info": "提示", "Warning": "提示", "Error": "出错", "Reset to default value": "恢复默认值",
    "a component of type image": "照片",
    // these are followed by more, often by one of the others
    "user's message: ": "问题：", "bot's message: ": "回答：", "number input for ": "输入数值：",
    "range slider for ": "滑块：",
  },

  translated(text) {
    const start = Object.keys(vqa.chinese).find(start => start.endsWith(" ") && text?.startsWith(start))
    if (!start) return vqa.chinese[text]
    const rest = text.slice(start.length)
    return vqa.chinese[start] + (vqa.chinese[rest] || rest)
  },

  mend(element) {
    if (element.matches("button img"))  // opens the photo; a screen reader needs a name
      element.closest("button").setAttribute("aria-label", vqa.language === "zh" ? "照片" : "Photo")
    if (vqa.language === "en") return
    for (const name of ["aria-label", "title"]) {
      const text = vqa.translated(element.getAttribute(name))
      if (text) element.setAttribute(name, text)
    }
    if (element.closest(".message, #words, table, ul")) return  // texts of the user and the model
    for (const node of element.childNodes) {
      const text = node.nodeType === Node.TEXT_NODE && vqa.chinese[node.data.trim()]
      if (text) node.data = text
    }
  },

  // ---- chats that are kept: [{id, title, messages}, …], newest first, in the storage of this browser

  kept() {
    try {
      return JSON.parse(localStorage.getItem("vqa-chats")) || []
    } catch {
      return []  // another program wrote it, or the storage is closed to us
    }
  },

  store(chats) {
    for (; ; chats.pop()) {  // the oldest give way if there is no room
      try {
        localStorage.setItem("vqa-chats", JSON.stringify(chats))
        break
      } catch {
        if (!chats.length) break
      }
    }
    return vqa.choices(chats)
  },

  current(id) {  // the chat that this tab shows, also after a reload; a given one from now on
    try {
      if (id !== undefined) sessionStorage.setItem("vqa-chat", id)
      return sessionStorage.getItem("vqa-chat")
    } catch {
      return null  // the storage is closed to us
    }
  },

  choices(chats) {
    const value = vqa.current()
    const choices = chats.map(chat => [chat.title, chat.id])
    return {__type__: "update", choices, value: chats.some(chat => chat.id === value) ? value : null}
  },

  keep(chat) {
    if (!chat || !chat.messages.length) return vqa.choices(vqa.kept())
    vqa.current(chat.id)
    return vqa.store([chat, ...vqa.kept().filter(other => other.id !== chat.id)])
  },

  forget(id) {
    return vqa.store(vqa.kept().filter(chat => id !== null && chat.id !== id))
  },

  open(id) {
    const chat = vqa.kept().find(chat => chat.id === id)
    if (chat) vqa.current(id)
    return chat || null
  },

  // ---- files

  choose_folder() {  // by the field that takes files one by one, so that they join those that are there
    const field = document.querySelector("#batch-files input[type=file]")
    const one_by_one = () => field.webkitdirectory = false
    field.addEventListener("change", one_by_one, {once: true})
    field.addEventListener("cancel", one_by_one, {once: true})
    field.webkitdirectory = true
    field.click()
  },

  download(file) {
    if (!file) return
    const link = document.createElement("a")
    Object.assign(link, {href: file.url, download: file.orig_name || "chat.zip"})
    link.click()
  },

  // ---- the box over the photo in #part

  photo_at(event) {
    return event.target.closest?.("#part")?.querySelector("img")
  },

  begin_box(event) {
    const photo = vqa.photo_at(event)
    if (!photo || event.target.closest("button:not(:has(img))")) return
    event.preventDefault()
    const frame = photo.getBoundingClientRect()
    const at = move => [
      Math.min(Math.max((move.clientX - frame.left) / frame.width, 0), 1),
      Math.min(Math.max((move.clientY - frame.top) / frame.height, 0), 1),
    ]
    const [x, y] = at(event)
    const drag = move => {
      const [toX, toY] = at(move)
      vqa.write_box([Math.min(x, toX), Math.min(y, toY), Math.max(x, toX), Math.max(y, toY)])
    }
    const end = () => {
      removeEventListener("pointermove", drag)
      removeEventListener("pointerup", end)
      removeEventListener("pointercancel", end)
    }
    addEventListener("pointermove", drag)
    addEventListener("pointerup", end)
    addEventListener("pointercancel", end)
  },

  write_box(edges) {
    const field = document.querySelector("#box textarea, #box input")
    field.value = edges[2] - edges[0] > 0.01 && edges[3] - edges[1] > 0.01 ? edges.map(e => e.toFixed(3)).join(",") : ""
    field.dispatchEvent(new Event("input", {bubbles: true}))
    vqa.show_box()
  },

  show_box() {
    const photo = document.querySelector("#part img"), field = document.querySelector("#box textarea, #box input")
    if (!photo || !field) return
    const frame = photo.parentElement
    const edges = field.value.split(",").map(Number)
    let drawn = frame.querySelector(".drawn-box")
    const [left, top, right, bottom] = edges
    if (edges.length !== 4 || !edges.every(edge => edge >= 0 && edge <= 1) || left >= right || top >= bottom) {
      drawn?.remove()
      return
    }
    if (!drawn) {
      drawn = document.createElement("div")
      drawn.className = "drawn-box"
      frame.style.position = "relative"
      frame.append(drawn)
    }
    Object.assign(drawn.style, {
      left: `${photo.offsetLeft + left * photo.offsetWidth}px`, width: `${(right - left) * photo.offsetWidth}px`,
      top: `${photo.offsetTop + top * photo.offsetHeight}px`, height: `${(bottom - top) * photo.offsetHeight}px`,
    })
  },
}

vqa.choose_language(vqa.language)
document.documentElement.lang = vqa.language === "zh" ? "zh-CN" : "en"
Object.defineProperty(navigator, "language", {get: () => document.documentElement.lang})
Object.defineProperty(navigator, "languages", {get: () => [document.documentElement.lang]})
addEventListener("pointerdown", vqa.begin_box, {passive: false})
addEventListener("dragstart", event => event.target.closest?.("#part") && event.preventDefault())
addEventListener("input", event => event.target.closest?.("#box") && vqa.show_box())
addEventListener("resize", vqa.show_box)
new MutationObserver(changes => {
  for (const {type, target, addedNodes} of changes) {
    if (type === "attributes") vqa.mend(target)
    for (const node of addedNodes)
      if (node.nodeType === 1) [node, ...node.querySelectorAll("*")].forEach(vqa.mend)
  }
}).observe(document, {childList: true, subtree: true, attributeFilter: ["aria-label", "title"]})
