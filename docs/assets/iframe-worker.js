// The site opens from the disk, and browsers start no workers from files. There the search's script runs in a hidden frame
// instead. Material's own stand-in would be loaded from a server, so mkdocs.yml names this one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.frame = frame.contentWindow

      // What the script posts arrives here, as from a worker.
      addEventListener("message", (event) => {
        if (event.source === this.frame) this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })

      // Messages wait until the script has loaded. Other scripts that it asks for load one after another.
      const page = frame.contentDocument
      page.open()
      page.write(`<script>
        postMessage = (data) => parent.postMessage(data, "*")
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done) => {
          document.body.append(Object.assign(document.createElement("script"), { src: url, onload: done }))
        })), Promise.resolve())
      </script><body></body>`)
      page.close()
      this.ready = new Promise((done, failed) => {
        const element = page.createElement("script")
        element.onload = done
        element.onerror = failed
        element.src = script
        page.body.append(element)
      })
    }

    postMessage(data) {
      this.ready.then(() => this.frame.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {}
  }
}
