import GemmaChat
import GemmaKit
import SwiftUI

/// Verifies the bundle against its goldens and measures its speed on this device.
struct BenchmarkView: View {
    let screen: ChatScreen

    var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            ScrollView {
                Text(screen.result ?? "Load a bundle in Chat, then tap Run.")
                    .font(.body.monospaced())
                    .textSelection(.enabled)
                    .frame(maxWidth: .infinity, alignment: .leading)
            }
            CurveView(spans: screen.spans, seconds: sustainedMinutes * 60)
            if let warning = screen.warning { Text(warning).foregroundStyle(.orange).font(.callout) }
            Text(screen.status).font(.caption).foregroundStyle(.secondary)
            HStack {
                if screen.busy {
                    Button("Stop", action: screen.stop)
                } else {
                    Button("Run", action: screen.benchmark)
                    Button("10 minutes") { screen.sustain() }
                }
                Spacer()
                if let report = screen.report { ShareLink(item: report) }
            }
        }
        .padding()
    }
}
