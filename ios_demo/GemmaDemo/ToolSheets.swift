import GemmaChat
import GemmaKit
import SwiftUI

/// Edits the tools of a chat as JSON.
struct ToolsEditor: View {
    let screen: ChatScreen
    @State private var text: String
    @State private var problem: String?
    @Environment(\.dismiss) private var dismiss

    init(screen: ChatScreen) {
        self.screen = screen
        _text = State(initialValue: screen.settings.hasTools ? screen.settings.tools : exampleTools)
    }

    var body: some View {
        NavigationStack {
            Form {
                if let problem { Text(problem).foregroundStyle(.orange) }
                Text("Nothing is run: you are asked for the result of each call. The app answers current_time itself.")
                Section("JSON schemas") {
                    TextEditor(text: $text)
                        .font(.body.monospaced())
                        .autocorrectionDisabled()
                        .textInputAutocapitalization(.never)
                        .frame(minHeight: 240)
                        .accessibilityLabel("JSON schemas")
                }
                Button("No tools") { use("") }
            }
            .navigationTitle("Tools that the model may call")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Cancel") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) { Button("Use") { use(text) } }
            }
        }
        .onChange(of: problem) { _, problem in if let problem { announce(problem) } }
    }

    private func use(_ tools: String) {
        Task {
            do {
                problem = nil
                try await screen.use(tools: tools)
                dismiss()
            } catch {
                problem = (error as? GemmaError)?.message ?? error.localizedDescription
            }
        }
    }
}

/// Asks for the result of each call of the last answer.
struct ResultsView: View {
    let screen: ChatScreen
    @State private var answers: [Answer]  // to the calls that were open when the sheet was
    @Environment(\.dismiss) private var dismiss

    init(screen: ChatScreen) {
        self.screen = screen
        _answers = State(initialValue: screen.openCalls.map { Answer(call: $0, text: builtInResult($0)?.write() ?? "") })
    }

    var body: some View {
        NavigationStack {
            Form {
                Text("Give what each call returns, as JSON or text.")
                ForEach(answers.indices, id: \.self) { index in
                    VStack(alignment: .leading) {
                        Text("Result of \(answers[index].call.summary)").font(.callout)
                        TextField("Result", text: $answers[index].text, axis: .vertical)
                            .autocorrectionDisabled()
                            .textInputAutocapitalization(.never)
                            .accessibilityLabel("Result of \(answers[index].call.summary)")
                    }
                }
            }
            .navigationTitle("The model calls tools")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Not now") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) { Button("Send", action: send) }
            }
        }
    }

    private func send() {
        screen.send(answers.map { parseResult($0.text) })
        dismiss()
    }
}

/// What a user gives as the result of a call.
private struct Answer {
    let call: ToolCall
    var text: String
}
