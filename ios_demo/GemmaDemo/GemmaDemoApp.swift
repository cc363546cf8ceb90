import GemmaChat
import SwiftUI

@main
struct GemmaDemoApp: App {
    @State private var screen = ChatScreen()
    @Environment(\.scenePhase) private var phase

    var body: some Scene {
        WindowGroup {
            TabView {
                Tab("Chat", systemImage: "bubble.left") { ChatView(screen: screen) }
                Tab("Benchmark", systemImage: "gauge") { BenchmarkView(screen: screen) }
            }
            // The system terminates apps that compute in the background.
            .onChange(of: phase) { _, now in if now == .background { screen.stop() } }
            // Keeps the display on, since sleep would end a long benchmark.
            .onChange(of: screen.busy) { _, busy in UIApplication.shared.isIdleTimerDisabled = busy }
            .onReceive(NotificationCenter.default.publisher(for: UIApplication.didReceiveMemoryWarningNotification)) { _ in
                screen.unload()
            }
        }
    }
}
