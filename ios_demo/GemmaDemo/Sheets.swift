import GemmaChat
import GemmaKit
import SwiftUI
import UniformTypeIdentifiers

/// Loads, imports, downloads and deletes bundles.
struct BundlesView: View {
    let screen: ChatScreen
    @State private var imports = false
    @Environment(\.dismiss) private var dismiss

    var body: some View {
        NavigationStack {
            List {
                ForEach(screen.bundles, id: \.self) { bundle in
                    Button(bundle == screen.bundle ? "\(bundle.lastPathComponent) ✓" : bundle.lastPathComponent) {
                        screen.choose(bundle)
                        dismiss()
                    }
                }
                .onDelete { places in if let place = places.first { screen.delete(screen.bundles[place]) } }
                if screen.bundles.isEmpty { NoBundle() }
                DownloadSection(screen: screen) { dismiss() }
            }
            .navigationTitle("Bundles")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Close") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) { Button("Import") { imports = true } }
            }
        }
        .onAppear { screen.findBundles() }
        .fileImporter(isPresented: $imports, allowedContentTypes: [.folder, .zip]) { chosen in
            guard let source = try? chosen.get() else { return }
            let isScoped = source.startAccessingSecurityScopedResource()
            screen.add(from: source) { if isScoped { source.stopAccessingSecurityScopedResource() } }
            dismiss()
        }
    }
}

private struct NoBundle: View {
    var body: some View {
        ContentUnavailableView(
            "There is no bundle yet",
            systemImage: "shippingbox",
            description: Text(
                "Download one, import a bundle's folder or zip file, or copy the folder to On My iPhone › Gemma demo with the Files app "
                    + "or Finder.")
        )
    }
}

/// Saved chats.
struct ChatsView: View {
    let screen: ChatScreen
    @Environment(\.dismiss) private var dismiss

    var body: some View {
        NavigationStack {
            List {
                ForEach(screen.chats) { chat in
                    Button(chat.title) {
                        screen.open(chat)
                        dismiss()
                    }
                }
                .onDelete { places in if let place = places.first { screen.delete(screen.chats[place]) } }
            }
            .navigationTitle("Chats")
            .toolbar { ToolbarItem(placement: .cancellationAction) { Button("Close") { dismiss() } } }
        }
    }
}

/// Edits one of the user's messages and sends it again.
struct MessageEditor: View {
    let screen: ChatScreen
    let turn: ChatScreen.Turn
    @State var text: String
    @Environment(\.dismiss) private var dismiss

    var body: some View {
        NavigationStack {
            VStack(alignment: .leading, spacing: 8) {
                TextEditor(text: $text).accessibilityLabel("Message")
                Text("The messages after it are removed.").font(.caption).foregroundStyle(.secondary)
            }
            .padding()
            .navigationTitle("Edit message")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Cancel") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) { Button("Send", action: send) }
            }
        }
    }

    private func send() {
        let edited = text.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !edited.isEmpty else { return }
        screen.edit(turn, edited)
        dismiss()
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
                .accessibilityLabel("JSON Schema")
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
