/** The line above the sheet that says what is wrong or what is waited for. */

export class Notice {
  constructor(box) {
    this._box = box;
  }

  /** @param {"wait" | "error"} kind */
  show(kind, text) {
    this._box.className = `notice ${kind}`;
    this._box.textContent = text;
    this._box.hidden = false;
  }

  hide() {
    this._box.hidden = true;
  }

  /** Count down a number of seconds; rejects with AbortError when stopped. */
  async countDown(seconds, text, signal) {
    for (let left = Math.ceil(seconds); left > 0; left -= 1) {
      this.show("wait", `${text} Trying again in ${left} s.`);
      await pause(1000, signal);
    }
    this.hide();
  }
}

/** Wait a number of milliseconds; rejects with AbortError when stopped. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", stop, { once: true });
  });
}
