import SwiftUI

struct ChatView: View {
    let screen: ChatScreen
    @State private var question = ""
    @State private var picking = false

    var body: some View {
        VStack(spacing: 8) {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(screen.turns) { turn in
                        Text(turn.text)
                            .textSelection(.enabled)
                            .foregroundStyle(turn.mine ? .secondary : .primary)
                            .frame(maxWidth: .infinity, alignment: turn.mine ? .trailing : .leading)
                    }
                }
            }
            .defaultScrollAnchor(.bottom)
            if let warning = screen.warning { Text(warning).foregroundStyle(.orange).font(.callout) }
            Text(screen.status).font(.caption).foregroundStyle(.secondary)
            HStack {
                TextField("Ask something", text: $question, axis: .vertical).textFieldStyle(.roundedBorder)
                if screen.busy { Button("Stop", action: screen.stop) } else { Button("Send", action: send) }
            }
            HStack {
                Button("Bundle") { picking = true }.disabled(screen.busy)
                Spacer()
                Button("New chat", action: screen.reset)
            }
        }
        .padding()
        .sheet(isPresented: $picking) { BundlePicker(screen: screen) }
    }

    private func send() {
        let text = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !text.isEmpty else { return }
        question = ""
        screen.send(text)
    }
}

struct BundlePicker: View {
    let screen: ChatScreen
    @Environment(\.dismiss) private var dismiss

    var body: some View {
        let bundles = screen.bundles()
        List(bundles, id: \.self) { bundle in
            Button(bundle.lastPathComponent) {
                screen.load(bundle)
                dismiss()
            }
        }
        .overlay {
            if bundles.isEmpty {
                ContentUnavailableView(
                    "No bundle is here yet",
                    systemImage: "shippingbox",
                    description: Text("Put a whole bundle folder into On My iPhone › Gemma demo, with the Files app or Finder.")
                )
            }
        }
    }
}
