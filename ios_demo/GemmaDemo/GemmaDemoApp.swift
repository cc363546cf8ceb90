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
            // The system ends apps that compute in the background.
            .onChange(of: phase) { _, now in if now == .background { screen.stop() } }
            .onReceive(NotificationCenter.default.publisher(for: UIApplication.didReceiveMemoryWarningNotification)) { _ in
                screen.unload()
            }
        }
    }
}
