import GemmaChat
import GemmaKit
import SwiftUI

struct ChatView: View {
    let screen: ChatScreen
    @State private var question = ""
    @State private var sheet: ChatSheet?
    @State private var edited: ChatScreen.Turn?

    var body: some View {
        VStack(spacing: 8) {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(screen.turns) { turn in TurnView(screen: screen, turn: turn, edited: $edited, sheet: $sheet) }
                }
            }
            .defaultScrollAnchor(.bottom)
            StatusView(screen: screen)
            HStack {
                TextField(screen.settings.format.hint, text: $question, axis: .vertical)
                    .textFieldStyle(.roundedBorder)
                if screen.busy { Button("Stop", action: screen.stop) } else { Button("Send", action: send) }
            }
            ScrollView(.horizontal) {
                HStack(spacing: 16) {
                    Button("Bundles") { sheet = .bundles }.disabled(screen.busy)
                    Button("Chats") { sheet = .chats }
                    Button("Settings") { sheet = .settings }.disabled(screen.busy)
                    Button(screen.settings.format.isAny ? "Schema" : "Schema ✓") { sheet = .schema }.disabled(screen.busy)
                    Button(screen.settings.hasTools ? "Tools ✓" : "Tools") { sheet = .tools }.disabled(screen.busy)
                    Button("New chat", action: screen.reset)
                }
            }
            .font(.callout)
        }
        .padding()
        .sheet(item: $sheet) { sheet in
            switch sheet {
            case .bundles: BundlesView(screen: screen)
            case .chats: ChatsView(screen: screen)
            case .settings: SettingsView(screen: screen)
            case .schema: SchemaEditor(screen: screen)
            case .tools: ToolsEditor(screen: screen)
            case .results: ResultsView(screen: screen)
            }
        }
        .sheet(item: $edited) { turn in MessageEditor(screen: screen, turn: turn, text: screen.question(turn)) }
        .onChange(of: screen.answersEnded) { _, _ in announce("The answer is complete.") }
        .onChange(of: screen.callsAsked) { _, _ in sheet = .results }
        .onChange(of: screen.warning) { _, warning in if let warning { announce(warning) } }
        .onChange(of: screen.unanswered) { _, text in if let text, question.isEmpty { question = text } }
    }

    private func send() {
        let text = question.trimmingCharacters(in: .whitespacesAndNewlines)
        guard !text.isEmpty, !screen.busy else { return }
        if screen.settings.conflict == nil { question = "" }
        screen.send(text)
    }
}

/// Has VoiceOver say what others see: an answer is written for long, and nothing else tells that it has ended.
@MainActor
func announce(_ text: String) {
    UIAccessibility.post(notification: .announcement, argument: text)
}

private enum ChatSheet: Identifiable {
    case bundles, chats, settings, schema, tools, results

    var id: Self { self }
}

/// One turn with a menu of what can be done with it; thoughts are folded.
private struct TurnView: View {
    let screen: ChatScreen
    let turn: ChatScreen.Turn
    @Binding var edited: ChatScreen.Turn?
    @Binding var sheet: ChatSheet?

    var body: some View {
        VStack(alignment: turn.isUser ? .trailing : .leading, spacing: 4) {
            if !turn.thought.isEmpty {
                DisclosureGroup("Thoughts") {
                    Text(turn.thought).font(.callout).foregroundStyle(.secondary).textSelection(.enabled)
                }
            }
            if turn.isUser {
                Text(turn.text)
                    .textSelection(.enabled)
                    .bubble(.tint.opacity(0.2))
                    .accessibilityLabel("You: \(turn.text)")
            } else {
                MarkdownView(text: turn.text, isWhole: !screen.busy || turn.id != screen.turns.last?.id)
                    .bubble(.fill.tertiary)
                    .accessibilityElement(children: .contain)
                    .accessibilityLabel(turn.isReply ? "Gemma" : "Note")
            }
            menu
        }
        .frame(maxWidth: .infinity, alignment: turn.isUser ? .trailing : .leading)
    }

    private var menu: some View {
        Menu {
            Button("Copy") { UIPasteboard.general.string = turn.text }
            if turn.place != nil { Button("Edit") { edited = turn }.disabled(screen.busy) }
            if screen.isLastAnswer(turn), !screen.openCalls.isEmpty {
                Button("Give results") { sheet = .results }.disabled(screen.busy)
            }
            if screen.isLastAnswer(turn) { Button("Answer again", action: screen.answerAgain).disabled(screen.busy) }
        } label: {
            Image(systemName: "ellipsis").frame(minWidth: 44, minHeight: 44)
        }
        .accessibilityLabel(turn.isUser ? "Actions for your message" : "Actions for the answer")
    }
}

extension View {
    /// On a shape that sets a message off from the others; the system's colours follow dark mode and contrast.
    fileprivate func bubble(_ style: some ShapeStyle) -> some View {
        padding(10).background(style, in: RoundedRectangle(cornerRadius: 14))
    }
}

/// Warnings, figures, and how full the context is.
private struct StatusView: View {
    let screen: ChatScreen

    var body: some View {
        VStack(spacing: 4) {
            if let warning = screen.warning { Text(warning).foregroundStyle(.orange).font(.callout) }
            if let use = screen.contextUse {
                ProgressView(value: Double(use.tokens), total: Double(max(1, use.limit)))
                    .accessibilityLabel("Context: \(use.tokens) of \(use.limit) tokens")
            }
            Text(screen.status).font(.caption).foregroundStyle(.secondary)
        }
    }
}
