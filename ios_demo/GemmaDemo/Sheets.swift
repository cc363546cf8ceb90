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

/// What the answers of a chat must be: JSON of a schema, of a compiled one, or both.
struct SchemaEditor: View {
    let screen: ChatScreen
    @State private var text: String
    @State private var grammar: GrammarFile?
    @State private var imports = false
    @State private var problem: String?
    @Environment(\.dismiss) private var dismiss

    init(screen: ChatScreen) {
        self.screen = screen
        _text = State(initialValue: screen.settings.format.schemaText)
        _grammar = State(initialValue: screen.settings.format.grammar)
    }

    var body: some View {
        NavigationStack {
            Form {
                if let problem { Text(problem).foregroundStyle(.orange) }
                Section("JSON Schema, which the app checks") {
                    TextEditor(text: $text)
                        .font(.body.monospaced())
                        .autocorrectionDisabled()
                        .textInputAutocapitalization(.never)
                        .frame(minHeight: 160)
                        .accessibilityLabel("JSON Schema")
                }
                Section("Compiled schema, which guarantees the format") {
                    if let grammar {
                        Text("Held to \(grammar.name)")
                        Button("Remove \(grammar.name)") { self.grammar = nil }
                    } else {
                        Text("A file of gemma-runtime compile-schema guarantees the format.")
                    }
                    Button("Choose a file …") { imports = true }
                }
                Section("Neither") { Button("Any answer") { use(AnswerFormat()) } }
            }
            .navigationTitle("Schema for answers")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Cancel") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) {
                    Button("Use") { attempt { use(try AnswerFormat(schema: text, grammar: grammar)) } }
                }
            }
        }
        .fileImporter(isPresented: $imports, allowedContentTypes: [.json, .data]) { chosen in attempt { try take(chosen.get()) } }
        .onChange(of: problem) { _, problem in if let problem { announce(problem) } }
    }

    private func use(_ format: AnswerFormat) {
        screen.use(format)
        dismiss()
    }

    private func take(_ file: URL) throws {
        let isScoped = file.startAccessingSecurityScopedResource()
        defer { if isScoped { file.stopAccessingSecurityScopedResource() } }
        grammar = try GrammarFile(file)
        if text == AnswerFormat().schemaText { text = "" }  // the example, which is not about this file
    }

    /// Does it, or says why not, and leaves what was entered.
    private func attempt(_ work: () throws -> Void) {
        do {
            problem = nil
            try work()
        } catch {
            problem = (error as? GemmaError)?.message ?? error.localizedDescription
        }
    }
}
