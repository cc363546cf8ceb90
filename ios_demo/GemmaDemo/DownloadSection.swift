import GemmaChat
import GemmaKit
import SwiftUI

/// Downloads a bundle from the hub, or goes on with a download that has not ended.
struct DownloadSection: View {
    let screen: ChatScreen
    let onStart: () -> Void
    @State private var address = ""
    @State private var isMeteredAllowed = false

    var body: some View {
        Section("Download from huggingface.co") {
            TextField("hub:OWNER/NAME", text: $address, axis: .horizontal).autocorrectionDisabled().textInputAutocapitalization(
                .never)
            Toggle("Also over mobile data", isOn: $isMeteredAllowed)
            Button("Download") { start(address) }.disabled(address.isEmpty || screen.busy)
            ForEach(screen.downloads) { unfinished in
                Button(String(format: "Go on with %@: %.2f GB have arrived", unfinished.address, Double(unfinished.bytes) / 1e9))
                {
                    start(unfinished.address)
                }
            }
            .onDelete { places in if let place = places.first { screen.discard(screen.downloads[place]) } }
        }
    }

    private func start(_ text: String) {
        screen.download(text, isMeteredAllowed: isMeteredAllowed)
        onStart()
    }
}
