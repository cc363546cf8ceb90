import GemmaChat
import GemmaKit
import SwiftUI

/// Of a chat: system prompt, thinking, a full context, sampling. Of all: where the model computes.
struct SettingsView: View {
    let screen: ChatScreen
    @State private var settings: ChatSettings
    @State private var computeUnits: ComputeUnits
    @State private var asBundleSays: Bool
    @State private var sampling: SamplingDraft
    @State private var seed: String
    @State private var problem: String?
    @Environment(\.dismiss) private var dismiss

    init(screen: ChatScreen) {
        self.screen = screen
        _settings = State(initialValue: screen.settings)
        _computeUnits = State(initialValue: screen.computeUnits)
        _asBundleSays = State(initialValue: screen.settings.sampling == nil)
        _sampling = State(initialValue: SamplingDraft(screen.settings.sampling))
        _seed = State(initialValue: screen.settings.seed.map(String.init) ?? "")
    }

    var body: some View {
        NavigationStack {
            Form {
                Section("System prompt") {
                    TextEditor(text: $settings.system).frame(minHeight: 80).accessibilityLabel("System prompt")
                }
                Section("Replies") {
                    Toggle("Think before answering", isOn: $settings.thinking)
                    Toggle("Forget the oldest turns of a full chat", isOn: $settings.roll)
                }
                Section("Sampling") {
                    Toggle("As the bundle says", isOn: $asBundleSays)
                    if !asBundleSays { SamplingFields(sampling: $sampling) }
                    TextField("Seed, for the same answer each time", text: $seed, axis: .horizontal)
                }
                Section("Compute units, for all chats, from the next loading on") {
                    Picker("Run on", selection: $computeUnits) {
                        ForEach(ComputeUnits.allCases, id: \.self) { Text($0.title).tag($0) }
                    }
                }
                if let problem { Text(problem).foregroundStyle(.orange) }
            }
            .navigationTitle("Settings")
            .toolbar {
                ToolbarItem(placement: .cancellationAction) { Button("Cancel") { dismiss() } }
                ToolbarItem(placement: .confirmationAction) { Button("Use", action: use) }
            }
        }
        .onChange(of: problem) { _, problem in if let problem { announce(problem) } }
    }

    private func use() {
        Task {
            do {
                problem = nil
                settings.sampling = asBundleSays ? nil : try sampling.sampling()
                settings.seed = try parseSeed(seed)
                try await screen.use(settings, computeUnits)
                dismiss()
            } catch {
                problem = (error as? GemmaError)?.message ?? error.localizedDescription
            }
        }
    }
}

private struct SamplingFields: View {
    @Binding var sampling: SamplingDraft

    var body: some View {
        field("Temperature", $sampling.temperature, 0...2)
        Stepper("Top k: \(sampling.topK == 0 ? "off" : "\(sampling.topK)")", value: $sampling.topK, in: 0...256)
        field("Top p", $sampling.topP, 0.05...1)
        field("Min p", $sampling.minP, 0...1)
        field("Repetition penalty", $sampling.repetitionPenalty, 1...2)
    }

    private func field(_ name: String, _ value: Binding<Double>, _ range: ClosedRange<Double>) -> some View {
        VStack(alignment: .leading) {
            Text(String(format: "%@: %.2f", name, value.wrappedValue))
            Slider(value: value, in: range).accessibilityLabel(name)
        }
    }
}
