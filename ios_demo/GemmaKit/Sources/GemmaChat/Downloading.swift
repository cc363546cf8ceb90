import Foundation
import GemmaKit

/// Downloads from the hub: only after a tap, and over mobile data only if the user allows it.
extension ChatScreen {
    /// Downloads a bundle, or goes on with one that has not ended, and loads it.
    public func download(_ text: String, isMeteredAllowed: Bool) {
        startTask {
            let address = try HubAddress(text)
            let download = self.makeDownload(self.library, isMeteredAllowed)
            self.status = "Asking the hub for \(address) …"
            defer { self.downloads = self.library.unfinished() }
            var shown = -shownBytes
            let bundle = try await self.follow({ try await download.run(address, onProgress: $0) }) {
                (progress: DownloadProgress) in
                guard progress.doneBytes - shown >= shownBytes else { return }
                shown = progress.doneBytes
                self.status = String(
                    format: "Downloaded %.2f of %.2f GB", Double(progress.doneBytes) / 1e9, Double(progress.totalBytes) / 1e9)
            }
            self.bundles = self.library.bundles()
            try await self.load(bundle)
            try await self.save()
        }
    }

    /// Deletes what has arrived of a download.
    public func discard(_ download: UnfinishedDownload) {
        startTask {
            try self.library.discard(download)
            self.downloads = self.library.unfinished()
        }
    }
}

private let shownBytes = 5_000_000
