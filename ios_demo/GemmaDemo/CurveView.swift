import GemmaKit
import SwiftUI

/// The rate of a sustained benchmark over time, from 0, and below it the memory.
struct CurveView: View {
    let spans: [Span]
    let seconds: Double  // of the whole run

    var body: some View {
        if let last = spans.last {
            VStack(alignment: .leading, spacing: 4) {
                let thermal = last.condition.thermal ?? "not told"
                Text(String(format: "%.1f tokens/s · thermal: %@", last.tokensPerSecond, thermal)).font(.caption)
                Curve(points: points(\.tokensPerSecond)).stroke(lineWidth: 2).frame(height: 70)
                if let bytes = last.condition.memoryBytes {
                    Text(String(format: "memory: %.0f MB", bytes / 1e6)).font(.caption)
                    Curve(points: points { $0.condition.memoryBytes ?? 0 }).stroke(lineWidth: 2).frame(height: 40)
                }
            }
            .accessibilityLabel(
                String(format: "%.1f tokens per second after %.0f seconds", last.tokensPerSecond, last.seconds))
        }
    }

    private func points(_ value: (Span) -> Double) -> [CGPoint] {
        let most = max(spans.map(value).max() ?? 0, 1e-9)
        return spans.map { CGPoint(x: $0.seconds / max(seconds, spans.last?.seconds ?? 1), y: value($0) / most) }
    }
}

/// A line through points from (0, 0), left below, to (1, 1).
private struct Curve: Shape {
    let points: [CGPoint]

    func path(in rect: CGRect) -> Path {
        var path = Path()
        path.addLines(
            points.map { CGPoint(x: rect.minX + $0.x * rect.width, y: rect.maxY - $0.y * rect.height) })
        return path
    }
}
