import GemmaChat
import GemmaKit
import SwiftUI

struct ChatView: View {
    let screen: ChatScreen
    @State private var question = ""
    @State private var showsBundles = false
    @State private var showsSchema = false

    var body: some View {
        VStack(spacing: 8) {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(screen.turns) { turn in
                        Text(turn.text)
                            .textSelection(.enabled)
                            .foregroundStyle(turn.isUser ? .secondary : .primary)
                            .frame(maxWidth: .infinity, alignment: turn.isUser ? .trailing : .leading)
                    }
                }
            }
            .defaultScrollAnchor(.bottom)
            if let warning = screen.warning { Text(warning).foregroundStyle(.orange).font(.callout) }
            Text(screen.status).font(.caption).foregroundStyle(.secondary)
            HStack {
                TextField(screen.schema == nil ? "Ask something" : "Ask for JSON", text: $question, axis: .vertical)
                    .textFieldStyle(.roundedBorder)
                if screen.busy { Button("Stop", action: screen.stop) } else { Button("Send", action: send) }
            }
            HStack {
                Button("Bundle") { showsBundles = true }.disabled(screen.busy)
                Button(screen.schema == nil ? "Schema" : "Schema ✓") { showsSchema = true }.disabled(screen.busy)
                Button(screen.roll ? "Full: forget" : "Full: stop") { screen.roll.toggle() }.disabled(screen.busy)
                Spacer()
                Button("New chat", action: screen.reset)
            }
        }
        .padding()
        .sheet(isPresented: $showsBundles) { BundlePicker(screen: screen) }
        .sheet(isPresented: $showsSchema) {
            SchemaEditor(screen: screen, text: screen.schema?.description ?? exampleSchema)
        }
    }

    private func send() {
        let text = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !text.isEmpty, !screen.busy else { return }
        question = ""
        screen.send(text)
    }
}

/// Edits the JSON Schema that answers must match.
struct SchemaEditor: View {
    let screen: ChatScreen
    @State var text: String
    @Environment(\.dismiss) private var dismiss

    var body: some View {
        NavigationStack {
            TextEditor(text: $text)
                .font(.body.monospaced())
                .autocorrectionDisabled()
                .textInputAutocapitalization(.never)
                .navigationTitle("JSON Schema")
                .toolbar {
                    ToolbarItem(placement: .cancellationAction) { Button("Any answer") { use("") } }
                    ToolbarItem(placement: .confirmationAction) { Button("Use") { use(text) } }
                }
        }
    }

    private func use(_ text: String) {
        screen.use(schema: text)
        dismiss()
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
                    "There is no bundle yet",
                    systemImage: "shippingbox",
                    description: Text("Copy a whole bundle folder to On My iPhone › Gemma demo, with the Files app or Finder.")
                )
            }
        }
    }
}
