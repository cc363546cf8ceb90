import GemmaChat
import GemmaKit
import SwiftUI

#if canImport(GemmaExecutorch)
import GemmaExecutorch

private let open: EngineOpener = openWithExecutorch
#else
private let open: EngineOpener = openEngine
#endif

@main
struct GemmaDemoApp: App {
    @State private var screen = ChatScreen(open: open)
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            TabView {
                Tab("Chat", systemImage: "bubble.left") { ChatView(screen: screen) }
                Tab("Benchmark", systemImage: "gauge") { BenchmarkView(screen: screen) }
            }
            .task { screen.resume() }
            // The system terminates apps that compute in the background.
            .onChange(of: phase) { _, now in if now == .background { screen.stop() } }
            // Keeps the display on, since sleep would end a long benchmark.
            .onChange(of: screen.busy) { _, busy in UIApplication.shared.isIdleTimerDisabled = busy }
            .onReceive(NotificationCenter.default.publisher(for: UIApplication.didReceiveMemoryWarningNotification)) { _ in
                screen.memoryWarning()
            }
        }
    }
}
